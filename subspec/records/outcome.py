"""``job.json``: how a job of a sweep ended, kept beside its records."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subspec.errors import SubspecError
from subspec.records.records import read_records
from subspec.utils.files import write_json

OUTCOME = "job.json"
LOG = "job.log"
"""What the job printed, all attempts one after another."""

RUNNING, OK, FAILED, INTERRUPTED = "running", "ok", "failed", "interrupted"
MISSING = "missing"
"""Status of a job that has not been started, or of which only its records tell."""


@dataclass(frozen=True)
class Outcome:
    """How a job's last attempt ended.

    Attributes:
        status: ``running`` (also after the sweep itself was killed), ``ok``, ``failed`` or ``interrupted``.
        exit_code: of the job's process; negative: the signal that ended it; None while it runs.
        reason: one line why it failed, else empty.
        seconds: that this attempt took.
        attempts: how often the job was started.
        samples: ``benchmark.max_samples`` of the attempt, so that asking for more runs the job again.
    """

    status: str
    exit_code: int | None = None
    reason: str = ""
    seconds: float = 0.0
    attempts: int = 1
    samples: int | None = None


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome in a job's folder; None when there is none that can be read."""
    try:
        return Outcome(**json.loads((folder / OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Replace ``job.json``.

    Raises:
        OSError: it cannot be written (the disk is full).
    """
    write_json(folder / OUTCOME, asdict(outcome))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a job that got that far."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_finished(folder: Path, samples: int | None, plan_only: bool) -> bool:
    """Whether the job in ``folder`` ended well, with as many samples as asked for now, and its files are whole: a
    record line that was damaged since is a turn to run again."""
    outcome = read_outcome(folder)
    if outcome is None or outcome.status != OK or outcome.samples != samples:
        return False
    if plan_only:
        return (folder / "plan.json").is_file()
    summary = read_summary(folder)
    if summary is None:
        return False
    try:
        records, _ = read_records(folder)
    except SubspecError:
        return False
    counts = summary["counts"]
    return len(records) >= counts["turns"] + sum(counts["skipped"].values())


def objective(summary: Mapping[str, Any] | None, name: str | None) -> float | None:
    """What a search maximises: the total called ``name`` of a summary; None when there is no such figure."""
    if summary is None or name is None:
        return None
    value = (summary.get("totals") or {}).get(name)
    return None if value is None else float(value)
