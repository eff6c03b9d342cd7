"""From a benchmark's configuration to its samples: choose the source, read rows, select.

The selection is a function of seed and sample ids alone: samples are ordered by a hash of both, so it does
not depend on Python's random generator, on the order of the rows, or on how many rows there are.
"""

import hashlib
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from subspec.benchmarks.base import Benchmark, Row, Sample, Task
from subspec.benchmarks.files import read_rows
from subspec.benchmarks.hub import HubRows, HubUnavailableError, describe, load_rows
from subspec.benchmarks.tasks import get_task, sample_id
from subspec.config.schema import BenchmarkConfig, Source
from subspec.errors import ConfigError

SAMPLE_DETAIL = "packaged sample prompts"


def load_benchmark(config: BenchmarkConfig, seed: int) -> Benchmark:
    """Load the prompts that a run asks for.

    Args:
        config: the composed ``benchmark`` group.
        seed: the run's seed; decides which rows are taken and in which order.

    Raises:
        SubspecError: the data cannot be had; one line that names the config key and the remedy.
    """
    task = get_task(config.name)
    source = Source(config.source)
    if config.max_samples is not None and config.max_samples < 1:
        raise ConfigError(f"benchmark.max_samples={config.max_samples} must be at least 1, or null for all")
    if config.path is not None and source is not Source.file:
        raise ConfigError(
            f"benchmark.path is set but benchmark.source={source.value} would not read it; "
            "add benchmark.source=file, or remove benchmark.path"
        )
    if source is Source.file:
        return _from_file(config, task, seed)
    if source is Source.sample:
        return _from_samples(config, task, seed, note=None)
    _check_hub(config, source)
    if source is Source.hub:
        return _from_hub(config, task, seed, auto=False)
    try:
        return _from_hub(config, task, seed, auto=True)
    except HubUnavailableError as error:
        note = (
            f"benchmark.source=auto: NOT the {config.name} data set but the project's own {SAMPLE_DETAIL}, "
            f"because {error.reason}"
        )
        return _from_samples(config, task, seed, note)


def _from_file(config: BenchmarkConfig, task: Task, seed: int) -> Benchmark:
    if config.path is None:
        raise ConfigError(
            "benchmark.source=file needs benchmark.path=<rows.jsonl>, a file with the hub's columns"
        )
    shown = f"benchmark.path={config.path}"
    rows = list(read_rows(Path(config.path).expanduser(), shown))
    samples = _convert_all(config.name, task, rows, shown, seed)
    return _benchmark(config, Source.file, str(config.path), None, samples, seed)


def _from_samples(config: BenchmarkConfig, task: Task, seed: int, note: str | None) -> Benchmark:
    shown = f"{SAMPLE_DETAIL} of {config.name}"
    with as_file(files("subspec.benchmarks") / "samples" / f"{config.name}.jsonl") as path:
        rows = list(read_rows(path, shown))
    # Row numbers would pass for rows of the real data set, in records above all.
    samples = _convert_all(config.name, task, rows, shown, seed, index_prefix="sample-")
    return _benchmark(config, Source.sample, SAMPLE_DETAIL, note, samples, seed)


def _from_hub(config: BenchmarkConfig, task: Task, seed: int, auto: bool) -> Benchmark:
    detail = describe(config.hub)
    loaded = load_rows(config.hub, task.columns)
    ids = _hub_ids(config.name, task, loaded)
    if not ids:
        raise ConfigError(f"benchmark.hub.path={detail} has no rows; correct benchmark.hub.split or .files")
    # Only the rows that are taken are decoded: some data sets have tens of thousands.
    samples = [
        _convert(task, Row(loaded.rows[i], f"benchmark.hub.path={detail} row {i}"), ids[i], seed)
        for i in _order(ids, seed)[: config.max_samples]
    ]
    note = None
    if auto:
        why = f"local cache, because {loaded.cached_because}" if loaded.cached_because else "the hub answers"
        note = f"benchmark.source=auto: the data set {detail} ({why})"
    if loaded.cached_because:
        detail += ", from the local cache"
    return Benchmark(config.name, Source.hub, detail, note, samples, len(ids))


def _check_hub(config: BenchmarkConfig, source: Source) -> None:
    for key in ("path", "split"):
        if getattr(config.hub, key) in (None, "", "???"):
            raise ConfigError(f"benchmark.hub.{key} is not set; benchmark.source={source.value} needs it")


def _hub_ids(name: str, task: Task, loaded: HubRows) -> list[str]:
    columns = [loaded.column(column) for column in task.id_columns if column in loaded.columns]
    own_ids = [
        next((value for value in values if value is not None), None) for values in zip(*columns, strict=True)
    ]
    own_ids = own_ids or [None] * len(loaded.rows)
    return _distinct([sample_id(name, task, own, i) for i, own in enumerate(own_ids)])


def _convert_all(
    name: str,
    task: Task,
    rows: list[tuple[int, dict[str, Any]]],
    shown: str,
    seed: int,
    index_prefix: str = "",
) -> list[Sample]:
    """Every row is converted, taken or not: mistakes in the user's own file should surface at once."""
    if not rows:
        raise ConfigError(f"{shown} holds no rows; give a .jsonl file with one row per line")
    own_ids = [
        next((row[key] for key in task.id_columns if row.get(key) is not None), None) for _, row in rows
    ]
    ids = _distinct([sample_id(name, task, own, i, index_prefix) for i, own in enumerate(own_ids)])
    return [
        _convert(task, Row(row, f"{shown} line {line}"), id_, seed)
        for id_, (line, row) in zip(ids, rows, strict=True)
    ]


def _convert(task: Task, row: Row, id_: str, seed: int) -> Sample:
    prompt = task.convert(row, id_, seed)
    return Sample(id_, prompt.turns, prompt.answer)


def _distinct(ids: list[str]) -> list[str]:
    """Later rows that repeat an id get a number: records and resuming rely on distinct ids."""
    taken, result = set(ids), []
    seen: set[str] = set()
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


def _benchmark(
    config: BenchmarkConfig, source: Source, detail: str, note: str | None, samples: list[Sample], seed: int
) -> Benchmark:
    order = _order([sample.id for sample in samples], seed)[: config.max_samples]
    return Benchmark(config.name, source, detail, note, [samples[i] for i in order], len(samples))
