"""``job.json``: how a job of a sweep ended, stored beside its records."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subspec.errors import SubspecError
from subspec.records.run_files import PLAN, SUMMARY, read_json
from subspec.records.run_folder import read_records
from subspec.utils.files import write_json

OUTCOME = "job.json"
LOG = "job.log"
"""Output of the job, all attempts in order."""

RUNNING, OK, FAILED, INTERRUPTED = "running", "ok", "failed", "interrupted"
MISSING = "missing"
"""Status of a job without ``job.json``: it has not been started, or only its records exist."""


@dataclass(frozen=True)
class Outcome:
    """How the last attempt of a job ended.

    Attributes:
        status: ``running`` (also after the sweep itself was killed), ``ok``, ``failed`` or ``interrupted``.
        exit_code: of the job's process; negative for a signal; None while it runs.
        reason: one line why it failed, else empty.
        seconds: duration of this attempt.
        attempts: number of starts.
        samples: ``benchmark.max_samples`` of the attempt; a larger value runs the job again.
    """

    status: str
    exit_code: int | None = None
    reason: str = ""
    seconds: float = 0.0
    attempts: int = 1
    samples: int | None = None


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome in a job's folder; None if there is no readable one."""
    found = read_json(folder / OUTCOME)
    try:
        return Outcome(**found) if found is not None else None
    except TypeError:
        return None


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Replace ``job.json``."""
    write_json(folder / OUTCOME, asdict(outcome))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json`` of a job; None if there is no readable one."""
    return read_json(folder / SUMMARY)


def is_finished(folder: Path, samples: int | None, plan_only: bool) -> bool:
    """Whether the job in ``folder`` succeeded with the current number of samples and its records are complete.

    A damaged record line is a turn to run again.
    """
    outcome = read_outcome(folder)
    if outcome is None or outcome.status != OK or outcome.samples != samples:
        return False
    if plan_only:
        return (folder / PLAN).is_file()
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
    """The total ``name`` of a summary, which a search maximises; None if there is no such figure."""
    if summary is None or name is None:
        return None
    value = (summary.get("totals") or {}).get(name)
    return None if value is None else float(value)
