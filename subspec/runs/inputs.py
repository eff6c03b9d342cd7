"""The data and weights that a configuration refers to. A resumed run must find those of its records.

A path, a hub id or a packaged sample may hold something else than before under the same configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from subspec.benchmarks import Benchmark, Sample
from subspec.config.enums import AUTO
from subspec.config.schema import Config, Source
from subspec.errors import ConfigError
from subspec.planning.budget import DeviceMemory, budget_of
from subspec.records.method import config_group
from subspec.records.run_files import ELSEWHERE, FACTS, RECORDS, read_json
from subspec.runs.turn import chat_messages, prompt_digest

WEIGHTS = "weights"
"""Field of ``facts.json``: digests of the weights by config group (``target``, ``draft``)."""

REMEDY = f"put back what the run began with, or {ELSEWHERE}"


def check_weights(run_dir: Path, config: Mapping[str, Any], weights: Mapping[str, str]) -> None:
    """Compare today's weights with those of the records. Folders of earlier versions name none.

    Args:
        config: the resolved configuration.
        weights: of :func:`subspec.session.weights_identity`.

    Raises:
        ConfigError: they are others.
    """
    before = config_group(read_json(run_dir / FACTS) or {}, WEIGHTS)
    for name, identity in weights.items():
        if before.get(name, identity) != identity:
            group = config_group(config, name)
            place = f"{name}.path={group['path']}" if group.get("path") else f"{name}={group.get('name')}"
            raise ConfigError(f"resume=true, but {place} now holds other weights: {REMEDY}")


def with_first_budget(config: Config, run_dir: Path, device: torch.device) -> Config:
    """The configuration with ``offload.vram_gib=auto`` resolved as in the folder's first session, if there was one.

    A device's free memory changes, and the plan with it; the times of one run must compare. Raises ConfigError if the
    device cannot hold that budget now.
    """
    first = (read_json(run_dir / FACTS) or {}).get("vram_gib")
    if first is None or getattr(config.offload, "vram_gib", None) != AUTO:
        return config
    offload = replace(config.offload, vram_gib=first)
    try:
        budget_of(offload, DeviceMemory.measured(device))
    except ConfigError as error:
        raise ConfigError(
            f"resume=true, but offload.vram_gib=auto was {first:g} GiB, and the device cannot hold them now: free "
            f"device memory, or {ELSEWHERE}"
        ) from error
    return replace(config, offload=offload)


def with_first_texts(config: Config, records: Sequence[Mapping[str, Any]]) -> Config:
    """The configuration with ``decoding.texts=auto`` resolved as for the folder's records, if there are any."""
    if not records or config.decoding.texts != AUTO:
        return config
    return replace(config, decoding=replace(config.decoding, texts=records[0].get("texts", 1)))


def check_prompts(run_dir: Path, records: Sequence[Mapping[str, Any]], benchmark: Benchmark) -> None:
    """Refuse to go on, by a ConfigError, if today's prompts or reference answers are not those of the records."""
    texts = {(record["sample_id"], record["turn"]): record.get("text") for record in records}
    samples = {sample.id: sample for sample in benchmark.samples}
    for record in records:
        if problem := _problem(record, benchmark, samples, texts):
            raise ConfigError(
                f"resume=true, but {_data_key(benchmark)} now holds other data: {problem} of sample "
                f"{record['sample_id']} in {run_dir / RECORDS} (turn {record['turn']}): {REMEDY}"
            )


def _problem(
    record: Mapping[str, Any],
    benchmark: Benchmark,
    samples: Mapping[str, Sample],
    texts: Mapping[tuple[str, int], str | None],
) -> str:
    """The part of a record that is not of today's data; empty if there is none."""
    id_, turn = record["sample_id"], record["turn"]
    sample = samples.get(id_)
    if sample is None:
        index, count = record.get("sample_index", len(samples)), len(samples)
        # With a smaller benchmark.max_samples the last samples are not selected.
        return "" if index >= count and count < benchmark.available else "it lacks the row"
    if turn >= len(sample.turns):
        return "it lacks the turn"
    answers = [texts.get((id_, earlier)) for earlier in range(turn)]
    known = None not in answers and record.get("prompt_sha256") is not None
    said = [text for pair in zip(sample.turns, answers, strict=False) for text in pair]
    if known and record["prompt_sha256"] != prompt_digest(chat_messages([*said, sample.turns[turn]])):
        return "it changed the prompt"
    return "" if record.get("reference") in (None, sample.answer) else "it changed the reference answer"


def _data_key(benchmark: Benchmark) -> str:
    keys = {Source.file: "benchmark.path", Source.hub: "benchmark.hub.path", Source.sample: "benchmark.source"}
    detail = benchmark.source.value if benchmark.source is Source.sample else benchmark.source_detail
    return f"{keys[benchmark.source]}={detail}"
