"""Names of the files in a run's folder; reading and locking."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

RECORDS = "records.jsonl"
DAMAGED = "records.jsonl.damaged"
SUMMARY = "summary.json"
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
PLAN = "plan.json"
FACTS = "facts.json"
OVERRIDES = "overrides.yaml"
LOCK = ".lock"

ELSEWHERE = "choose another folder with run_dir="
"""Remedy for a folder that a run cannot have."""


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON file that holds a mapping; None if it is absent, unreadable or something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def take_lock(folder: Path, wait_s: float = 0.0) -> "BaseFileLock | None":
    """Acquire the folder's lock, which ends with its process; None if another process holds it."""
    import filelock  # a refused run does without

    lock = filelock.FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=wait_s, poll_interval=0.2)
    except filelock.Timeout:
        return None
    return lock
