"""Load a benchmark: choose the source, read rows, convert and select them.

The selection depends on the seed and the sample ids alone: samples are ordered by a hash of both. It does not depend
on Python's random generator, on the order of the rows, or on their number.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from subspec.benchmarks.hub import HubUnavailableError, describe, load_rows
from subspec.benchmarks.prompts import Task, get_task
from subspec.benchmarks.rows import Row, read_rows
from subspec.config.schema import BenchmarkConfig, Source
from subspec.errors import ConfigError

SAMPLE_DETAIL = "packaged sample prompts"


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
        note: choice of ``source=auto`` and its reason, in one line; None for an explicit source.
        samples: shuffled with the seed and cut to ``max_samples``.
        available: number of rows before the cut.
    """

    name: str
    source: Source
    source_detail: str
    note: str | None
    samples: list[Sample]
    available: int


def load_benchmark(config: BenchmarkConfig, seed: int) -> Benchmark:
    """Load the prompts of a run.

    Args:
        config: the ``benchmark`` group, already checked by :func:`subspec.config.checks.check_values`.
        seed: seed of the run; decides the rows and their order.

    Raises:
        SubspecError: the data is not available; one line with the config key and the remedy.
    """
    task, source = get_task(config.name), Source(config.source)
    if source is Source.file:
        shown = f"benchmark.path={config.path}"
        rows = list(read_rows(Path(str(config.path)).expanduser(), shown))
        return _from_rows(config, task, seed, rows, shown, Source.file, str(config.path))
    if source is Source.sample:
        return _from_samples(config, task, seed, note=None)
    for key in ("path", "split"):
        if getattr(config.hub, key) in (None, "", "???"):
            raise ConfigError(f"benchmark.hub.{key} is not set; benchmark.source={source.value} needs it")
    try:
        return _from_hub(config, task, seed)
    except HubUnavailableError as error:
        if source is Source.hub:
            raise
        note = (
            f"benchmark.source=auto: NOT the {config.name} data set but the project's own {SAMPLE_DETAIL}, "
            f"because {error.reason}"
        )
        return _from_samples(config, task, seed, note)


def _from_samples(config: BenchmarkConfig, task: Task, seed: int, note: str | None) -> Benchmark:
    shown = f"{SAMPLE_DETAIL} of {config.name}"
    with as_file(files("subspec.benchmarks") / "samples" / f"{config.name}.jsonl") as path:
        rows = list(read_rows(path, shown))
    return _from_rows(config, task, seed, rows, shown, Source.sample, SAMPLE_DETAIL, note, "sample-")


def _from_rows(
    config: BenchmarkConfig,
    task: Task,
    seed: int,
    rows: list[tuple[int, dict[str, Any]]],
    shown: str,
    source: Source,
    detail: str,
    note: str | None = None,
    index_prefix: str = "",
) -> Benchmark:
    """Convert every row, selected or not, so that a mistake in the user's file is reported at once.

    ``index_prefix`` keeps row numbers of packaged prompts from being mistaken for rows of the real data set.
    """
    if not rows:
        raise ConfigError(f"{shown} holds no rows; give a .jsonl file with one row per line")
    own = [[row.get(key) for key in task.id_columns] for _, row in rows]
    ids = _distinct([_sample_id(config.name, task, one, i, index_prefix) for i, one in enumerate(own)])
    samples = [
        _sample(task, Row(row, f"{shown} line {line}"), id_, seed)
        for id_, (line, row) in zip(ids, rows, strict=True)
    ]
    chosen = [samples[i] for i in _order(ids, seed)[: config.max_samples]]
    return Benchmark(config.name, source, detail, note, chosen, len(samples))


def _from_hub(config: BenchmarkConfig, task: Task, seed: int) -> Benchmark:
    detail = describe(config.hub)
    loaded = load_rows(config.hub, task.columns)
    columns = [loaded.column(column) for column in task.id_columns if column in loaded.columns]
    own = list(zip(*columns, strict=True)) if columns else [()] * len(loaded.rows)
    ids = _distinct([_sample_id(config.name, task, one, i) for i, one in enumerate(own)])
    if not ids:
        raise ConfigError(f"benchmark.hub.path={detail} has no rows; correct benchmark.hub.split or .files")
    # Only selected rows are decoded: some data sets have tens of thousands.
    samples = [
        _sample(task, Row(loaded.rows[i], f"benchmark.hub.path={detail} row {i}"), ids[i], seed)
        for i in _order(ids, seed)[: config.max_samples]
    ]
    note = None
    if Source(config.source) is Source.auto:
        why = f"local cache, because {loaded.cached_because}" if loaded.cached_because else "the hub answers"
        note = f"benchmark.source=auto: the data set {detail} ({why})"
    if loaded.cached_because:
        detail += ", from the local cache"
    return Benchmark(config.name, Source.hub, detail, note, samples, len(ids))


def _sample(task: Task, row: Row, id_: str, seed: int) -> Sample:
    prompt = task.convert(row, id_, seed)
    return Sample(id_, prompt.turns, prompt.answer, row.optional("category"))


def _sample_id(name: str, task: Task, own: Sequence[Any], index: int, index_prefix: str = "") -> str:
    """Id of a row: the first value of ``own`` (the data set's own ids) that is present, else the row number."""
    found = next((value for value in own if value is not None), None)
    if found is None or isinstance(found, float | bool) or not str(found).strip():
        return f"{name}/{index_prefix}{index}"
    text = re.sub(r"\s+", " ", str(found).strip())
    return text if task.own_ids or text.startswith(f"{name}/") else f"{name}/{text}"


def _distinct(ids: list[str]) -> list[str]:
    """Number repeated ids: records and resuming rely on distinct ones. The first keeps its id."""
    taken, seen, result = set(ids), set(), []
    for id_ in ids:
        unique, n = id_, 2
        if id_ in seen:
            while (unique := f"{id_}#{n}") in taken:
                n += 1
            taken.add(unique)
        seen.add(unique)
        result.append(unique)
    return result


def _order(ids: list[str], seed: int) -> list[int]:
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}/{ids[i]}".encode()).digest())
