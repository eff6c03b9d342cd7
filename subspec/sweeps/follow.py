"""Progress of a job, read from the files it writes into its folder."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from subspec.records.metrics import ratio
from subspec.records.outcome import LOG, RUNNING, Outcome, read_outcome
from subspec.records.run_files import RECORDS

if TYPE_CHECKING:
    from subspec.sweeps.progress import SweepProgress

WATCH_S = 1.0
"""Seconds between two checks of jobs that another project's launcher runs."""

_PROGRESS = re.compile(rb"^\[(\d+)/(\d+)\] ", re.MULTILINE)


@dataclass
class FollowedJob:
    """A job and its figures so far.

    Attributes:
        folder: run folder.
        label: name for people.
        gpu: the visible GPU; None: as the sweep itself, or unknown.
        done, total: finished and all samples; ``total`` is None until known.
        tokens_per_s, tau: over the records so far; None before the first.
    """

    folder: Path
    label: str = ""
    gpu: str | None = None
    done: int = 0
    total: int | None = None
    tokens_per_s: float | None = None
    tau: float | None = None
    _sums: dict[str, float] = field(default_factory=dict)
    _at_done: float = 0.0
    _samples: set[str] = field(default_factory=set)
    _read: int = 0
    _log_read: int = 0
    _started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def expected_s(self) -> float | None:
        """Estimated duration, from the samples so far; None before the first."""
        if not self.done or not self.total:
            return None
        a_sample = self._sums.get("loop_s", 0.0) / self.done
        return self._at_done + a_sample * (self.total - self.done)

    def follow(self) -> None:
        """Read new lines of the records and the log."""
        for line in self._new_lines(self.folder / RECORDS, "_read"):
            try:
                self._count(json.loads(line))
            except ValueError:
                continue
        for line in self._new_lines(self.folder / LOG, "_log_read"):
            if found := _PROGRESS.match(line):
                self.done, self.total, self._at_done = int(found[1]), int(found[2]), self.seconds

    def _new_lines(self, file: Path, position: str) -> list[bytes]:
        """Complete lines written since the last call."""
        try:
            with file.open("rb") as stream:
                stream.seek(getattr(self, position))
                data = stream.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        setattr(self, position, getattr(self, position) + len(whole))
        return whole.splitlines()

    def _count(self, record: Mapping[str, Any]) -> None:
        self._samples.add(str(record.get("sample_id")))
        for name in ("verified_tokens", "iterations", "decode_s", "loop_s"):
            self._sums[name] = self._sums.get(name, 0) + (record.get(name) or 0)
        self.tokens_per_s = ratio(self._sums["verified_tokens"], self._sums["decode_s"])
        self.tau = ratio(self._sums["verified_tokens"], self._sums["iterations"])


class ForeignJob(FollowedJob):
    """A job of another project's launcher, possibly on another machine that shares the folder."""

    def __init__(self, folder: Path, label: str) -> None:
        super().__init__(folder, label)
        before = read_outcome(folder)
        self._attempts = before.attempts if before else 0
        if (log := folder / LOG).exists():
            self._log_read = log.stat().st_size
        self.is_running = False

    def look(self) -> Outcome | None:
        """Update start and progress; returns the outcome once the job has ended."""
        outcome = read_outcome(self.folder)
        if outcome is None or outcome.attempts <= self._attempts:
            return None
        if not self.is_running:
            self.is_running, self._started = True, time.monotonic()
        self.follow()
        return outcome if outcome.status != RUNNING else None


@contextmanager
def watched(progress: "SweepProgress", jobs: Sequence[ForeignJob]) -> Iterator[None]:
    """Show the progress of ``jobs``, run by another project's launcher, during the block."""
    waiting, over = list(jobs), Event()

    def look() -> None:
        for job in list(waiting):
            known = job.is_running
            outcome = job.look()
            if job.is_running and not known:
                progress.started(job)
            if outcome is not None:
                waiting.remove(job)
                progress.finished(job, outcome)
        running = [job for job in waiting if job.is_running]
        progress.update(running, [job.label for job in waiting if not job.is_running])

    def keep_looking() -> None:
        while not over.wait(WATCH_S):
            look()

    with progress.shown():
        watcher = Thread(target=keep_looking, name="watch of a sweep", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            look()
