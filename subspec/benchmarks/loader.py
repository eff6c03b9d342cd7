"""Load a benchmark: choose the source, read rows, convert and select them.

The selection depends on the seed and the sample ids alone: samples are ordered by a hash of both. It does not depend
on Python's random generator, on the order of the rows, or on their number.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from subspec.benchmarks.hub import describe, load_rows
from subspec.benchmarks.prompts import Task, get_task
from subspec.benchmarks.rows import DataUnavailableError, Row, RowError, Table
from subspec.config.schema import BenchmarkConfig, Source
from subspec.errors import ConfigError

SAMPLE_DETAIL = "packaged sample prompts"

NAMED = 3
"""Unusable rows that the note names; ``facts.json`` of a run holds all."""


@dataclass(frozen=True)
class Sample:
    """One prompt of a benchmark.

    Attributes:
        id: stable across runs and sources, e.g. ``gsm8k/17``, or the data set's own id.
        turns: user messages, in order.
        answer: reference answer in canonical form; None if it cannot be checked.
        category: the data set's own category, e.g. ``writing``; None if it has none.
    """

    id: str
    turns: tuple[str, ...]
    answer: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """The prompts of a run and their origin.

    Attributes:
        name: name in ``conf/benchmark/``.
        source: the source used; never ``auto``.
        source_detail: hub coordinates, the file path as configured, or "packaged sample prompts".
        note: choice of ``source=auto`` and its reason, and the number of unusable rows, in one line; None without both.
        samples: shuffled with the seed and cut to ``max_samples`` and ``per_category``.
        available: number of rows of the chosen categories before the cut.
        skipped: one line for each unusable row. All rows of a file are checked, rows of the hub until there are enough.
    """

    name: str
    source: Source
    source_detail: str
    note: str | None
    samples: list[Sample]
    available: int
    skipped: list[str] = field(default_factory=list)


def load_benchmark(config: BenchmarkConfig, seed: int) -> Benchmark:
    """Load the prompts of a run.

    Args:
        config: the ``benchmark`` group, already checked by :func:`subspec.config.checks.check_values`.
        seed: of the run; decides the rows and their order.

    Raises:
        SubspecError: the data is not available; one line with the config key and the remedy.
    """
    task, source = get_task(config.name), Source(config.source)
    try:
        return _build(config, task, seed, _open(config, task, source))
    except DataUnavailableError as error:
        if source is not Source.auto:
            raise
        note = (
            f"benchmark.source=auto: NOT the {config.name} data set but the project's own {SAMPLE_DETAIL}, "
            f"because {error.reason}"
        )
        return _build(config, task, seed, replace(_open(config, task, Source.sample), note=note))


@dataclass(frozen=True)
class _Opened:
    """Rows, and the fields of :class:`Benchmark` that say where they come from."""

    rows: Table
    source: Source
    detail: str
    note: str | None = None


def _open(config: BenchmarkConfig, task: Task, source: Source) -> _Opened:
    if source is Source.file:
        path = str(config.path)
        return _Opened(Table.read(Path(path).expanduser(), f"benchmark.path={path}"), source, path)
    if source is Source.sample:
        with as_file(files("subspec.benchmarks") / "samples" / f"{config.name}.jsonl") as path:
            return _Opened(Table.read(path, f"{SAMPLE_DETAIL} of {config.name}"), source, SAMPLE_DETAIL)
    unset = next((key for key in ("path", "split") if getattr(config.hub, key) in (None, "", "???")), None)
    if unset and task.published:
        raise DataUnavailableError(
            f"benchmark={config.name} is not on the hub, but at {task.published}",
            "download the file and use benchmark.source=file benchmark.path=FILE",
        )
    if unset:
        raise ConfigError(f"benchmark.hub.{unset} is not set; benchmark.source={config.source.value} needs it")
    detail, note = describe(config.hub), None
    rows, cached_because = load_rows(config.hub, (*task.columns, task.category))
    if source is Source.auto:
        why = f"local cache, because {cached_because}" if cached_because else "the hub answers"
        note = f"benchmark.source=auto: the data set {detail} ({why})"
    if cached_because:
        detail += ", from the local cache"
    return _Opened(rows, Source.hub, detail, note)


def _build(config: BenchmarkConfig, task: Task, seed: int, opened: _Opened) -> Benchmark:
    data, note = opened.rows, opened.note
    if not len(data.rows):
        raise ConfigError(f"{data.shown} holds no rows; correct the file, benchmark.hub.split or benchmark.hub.files")
    # Row numbers of packaged prompts must not be mistaken for rows of the real data set.
    prefix = "sample-" if opened.source is Source.sample else ""
    own = zip(*(data.column(name) for name in task.id_columns), strict=True)
    ids = _distinct([_sample_id(config.name, task, one, f"{prefix}{i}") for i, one in enumerate(own)])
    categories = [_valid(one) if isinstance(one, str) else None for one in data.column(task.category)]
    wanted = _wanted_categories(config, task, categories)
    order = [i for i in _order(ids, seed) if wanted is None or categories[i] in wanted]
    samples, errors = _select(
        order,
        [one if config.per_category else None for one in categories],
        lambda i: _sample(task, data.row(i), ids[i], categories[i], seed),
        config.per_category or config.max_samples,
        # All mistakes in a user's file are reported at once. A hub's rows are decoded only if they are selected.
        check_all=data.places is not None,
    )
    if not samples:
        raise errors[min(errors)]
    skipped = [errors[i].short for i in sorted(errors)]
    if skipped:
        more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        left_out = f"unusable rows left out: {len(skipped)} ({'; '.join(skipped[:NAMED])}{more})"
        note = f"{note}; {left_out}" if note else left_out
    available = len(order) - len(errors)
    return Benchmark(config.name, opened.source, opened.detail, note, samples[: config.max_samples], available, skipped)


def _select(
    order: list[int], groups: list[str | None], convert: Callable[[int], Sample], limit: int | None, check_all: bool
) -> tuple[list[Sample], dict[int, RowError]]:
    """The first ``limit`` usable rows of each group, one of each group first, so that fewer are a prefix of more.

    Args:
        order: positions of the rows, the first choice first; groups: of the rows, by position.
        convert: a position to its sample.
        limit: None: all.
        check_all: convert rows that are not selected, too.

    Returns:
        The samples, and the errors of unusable rows by position.
    """
    ranked: list[tuple[int, Sample]] = []
    errors: dict[int, RowError] = {}
    taken: Counter[str | None] = Counter()
    for i in order:
        chosen = limit is None or taken[groups[i]] < limit
        if not chosen and not check_all:
            continue
        try:
            sample = convert(i)
        except RowError as error:
            errors[i] = error
        else:
            if chosen:
                ranked.append((taken[groups[i]], sample))
                taken[groups[i]] += 1
    if len(taken) > 1:
        ranked.sort(key=lambda pair: pair[0])
    return [sample for _, sample in ranked], errors


def _wanted_categories(config: BenchmarkConfig, task: Task, categories: list[str | None]) -> set[str] | None:
    """Categories of the data set that ``categories`` selects, by their own names or by their groups'; None: all."""
    present = {category for category in categories if category}
    key = "categories" if config.categories is not None else "per_category"
    if not present and getattr(config, key) is not None:
        raise ConfigError(
            f"benchmark.{key}: the rows of benchmark={config.name} have no categories (column '{task.category}'); "
            "leave it out"
        )
    if config.categories is None:
        return None
    names = present | {task.groups[category] for category in present & task.groups.keys()}
    unknown = [name for name in config.categories if name not in names]
    if unknown:
        raise ConfigError(
            f"benchmark.categories: the data has no category {unknown[0]!r}; it has: {', '.join(sorted(names))}"
        )
    asked = set(config.categories)
    return {category for category in present if {category, task.groups.get(category)} & asked}


def _sample(task: Task, row: Row, id_: str, category: str | None, seed: int) -> Sample:
    prompt = task.convert(row, id_, seed)
    text = "".join((*prompt.turns, prompt.answer or ""))
    if _valid(text) != text:
        raise row.error("the text holds half of a surrogate pair, which is no character")
    return Sample(id_, prompt.turns, prompt.answer, category)


def _valid(text: str) -> str:
    """``text`` with ``?`` for halves of surrogate pairs, which JSON files may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _sample_id(name: str, task: Task, own: Sequence[Any], number: str) -> str:
    """Id of a row: the first value of ``own`` (the data set's own ids) that is present, else the row ``number``."""
    found = next((value for value in own if value is not None), None)
    if found is None or isinstance(found, float | bool) or not str(found).strip():
        return f"{name}/{number}"
    text = _valid(re.sub(r"\s+", " ", str(found).strip()))
    return text if task.own_ids or text.startswith(f"{name}/") else f"{name}/{text}"


def _distinct(ids: list[str]) -> list[str]:
    """Number repeated ids: records and resuming rely on distinct ones. The first keeps its id."""
    taken, result = set(ids), {}
    for id_ in ids:
        numbered = (f"{id_}#{n}" for n in itertools.count(2))
        unique = next(one for one in numbered if one not in taken) if id_ in result else id_
        taken.add(unique)
        result[unique] = None
    return list(result)


def _order(ids: list[str], seed: int) -> list[int]:
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}/{ids[i]}".encode()).digest())
