"""Run folders to report on: written as the runner writes them, with figures chosen by the test."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from subspec.decoding.result import FinishReason
from subspec.records.metrics import LinkInfo, summarise
from subspec.report.__main__ import main
from subspec.report.baseline import make_rows
from subspec.report.rows import Row
from subspec.report.run_data import collect
from subspec.runs.turn import RunContext, turn_record
from tests.helpers.records import result


def config_of(draft: str | dict[str, Any] = "subspec", **changes: Any) -> dict[str, Any]:
    """A resolved configuration; ``changes`` are whole groups or keys."""
    config: dict[str, Any] = {
        "target": {"name": "some_target"},
        "draft": draft if isinstance(draft, dict) else {"name": draft},
        "quant": {"name": "hqq", "bits": 4},
        "tree": {"name": "beam", "depth": 3, "width": 2},
        "decoding": {"name": "greedy"},
        "offload": {"name": "none"},
        "benchmark": {"name": "gsm8k", "max_samples": 4},
        "logger": {"name": "none"},
        "experiment": None,
        "seed": 0,
    }
    return config | changes


def turns(
    speeds: Sequence[float],
    *,
    draft: str = "subspec",
    planted: bool = False,
    source: str = "hub",
    benchmark: str = "gsm8k",
    target: str = "some_target",
    device: str = "cpu",
    link: LinkInfo | None = None,
    tau: int = 3,
    **fields: Any,
) -> list[dict[str, Any]]:
    """A turn per speed: sample s0, s1, ... of 10, 11, ... passes with ``tau`` tokens each."""
    context = RunContext(benchmark, source, target, draft, device, planted, 0)
    records = []
    for index, speed in enumerate(speeds):
        passes = 10 + index
        tokens = tau * passes
        seconds = tokens / speed
        drafts = draft != "none"
        generated = result(
            verified=tokens,
            iterations=passes,
            drafted=(passes,) * 3 * drafts,
            accepted=(passes, passes - 2, passes // 2) * drafts,
            reached=(passes, passes, passes - 2) * drafts,
            block_s=(seconds / passes,) * passes,
            decode_s=seconds,
            draft_s=0.25 * seconds * drafts,
            verify_s=0.5 * seconds,
            finish=FinishReason.length,
        )
        made = turn_record(
            context,
            generated,
            sample_id=f"s{index}",
            sample_index=index,
            messages=f"question {index} of {benchmark} from {source}",
            link=link,
            peak_vram_gib=7.5 if link else None,
            peak_ram_gib=1.0 + index,
        )
        records.append({**made, **fields})
    return records


def write_run(
    folder: Path,
    records: Sequence[dict[str, Any]],
    config: dict[str, Any] | None = None,
    *,
    finished: bool = True,
    facts: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    gpu: str | None = None,
) -> Path:
    """Write a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(yaml.safe_dump(config or config_of()))
    (folder / "overrides.yaml").write_text(yaml.safe_dump(["draft=subspec", "quant.bits=4"]))
    hardware = {"cpu": "a CPU", "torch_threads": 2, "gpu": gpu and {"name": gpu}}
    environment = {"hardware": hardware, "versions": {"torch": "2.0"}, "git": {"commit": "f" * 40, "dirty": False}}
    (folder / "environment.json").write_text(json.dumps(environment))
    if finished:
        (folder / "summary.json").write_text(json.dumps(summarise(records)))
    for name, content in (("facts.json", facts), ("plan.json", plan)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def plain_run(folder: Path, speeds: Sequence[float] = (10.0, 8.0, 12.0), **options: Any) -> Path:
    """Plain decoding: no tree, a token a pass."""
    config, facts = options.pop("config", None), options.pop("facts", None)
    records = turns(speeds, draft="none", tau=1, **options)
    return write_run(folder, records, config or config_of("none"), facts=facts)


def rows_below(folder: Path) -> list[Row]:
    """Rows of the runs below a folder."""
    return make_rows(collect([folder]))[0]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """``python -m subspec.report ARGUMENTS``: exit status, output, errors."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code, *capsys.readouterr()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status, and the one line on standard error."""
    code, _, err = run(capsys, *arguments)
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: "), err
    return code, err
