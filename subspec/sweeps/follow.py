"""Progress of a job, read from the files it writes into its folder."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from subspec.records.metrics import ratio
from subspec.records.outcome import LOG, RUNNING, Outcome, read_outcome
from subspec.records.run_files import RECORDS

if TYPE_CHECKING:
    from subspec.sweeps.progress import SweepProgress

WATCH_S = 1.0  # between two checks of jobs that another project's launcher runs

_PROGRESS = re.compile(rb"^\[(\d+)/(\d+)\] ", re.MULTILINE)


class GrowingFile:
    """A file that another process appends to. ``position``: bytes read so far."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def skip(self) -> None:
        """Leave out what it holds now."""
        self.position = self.path.stat().st_size if self.path.exists() else 0

    def new_lines(self) -> list[bytes]:
        """Complete lines written since the last call."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.position)
                data = stream.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.position += len(whole)
        return whole.splitlines()


class FollowedJob:
    """A job and its figures so far.

    Attributes:
        folder: run folder.
        label: name for people.
        gpu: the visible GPU; None: as the sweep itself, or unknown.
        done, total: finished and all samples; ``total`` is None until known.
        sums: over the records so far. samples: their ids.
    """

    def __init__(self, folder: Path, label: str = "") -> None:
        self.folder, self.label = folder, label
        self.gpu: str | None = None
        self.done, self.total = 0, None
        self.sums: Counter[str] = Counter()
        self.samples: set[str] = set()
        self.records, self.log = GrowingFile(folder / RECORDS), GrowingFile(folder / LOG)
        self.started_s, self.at_done_s = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_s

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed so far."""
        return ratio(self.sums["verified_tokens"], self.sums["decode_s"])

    @property
    def tau(self) -> float | None:
        """Tokens per target pass so far."""
        return ratio(self.sums["verified_tokens"], self.sums["iterations"])

    @property
    def expected_s(self) -> float | None:
        """Estimated duration, from the samples so far; None before the first."""
        if not self.done or not self.total:
            return None
        return self.at_done_s + self.sums["loop_s"] / self.done * (self.total - self.done)

    def follow(self) -> None:
        """Read new lines of the records and the log."""
        for line in self.records.new_lines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            self.samples.add(str(record.get("sample_id")))
            for name in ("verified_tokens", "iterations", "decode_s", "loop_s"):
                self.sums[name] += record.get(name) or 0
        for line in self.log.new_lines():
            if found := _PROGRESS.match(line):
                self.done, self.total, self.at_done_s = int(found[1]), int(found[2]), self.seconds


class ForeignJob(FollowedJob):
    """A job of another project's launcher, possibly on another machine that shares the folder."""

    def __init__(self, folder: Path, label: str) -> None:
        super().__init__(folder, label)
        before = read_outcome(folder)
        self.attempts_before = before.attempts if before else 0
        self.log.skip()
        self.is_running = False

    def look(self) -> Outcome | None:
        """Update start and progress; returns the outcome once the job has ended."""
        outcome = read_outcome(self.folder)
        if outcome is None or outcome.attempts <= self.attempts_before:
            return None
        if not self.is_running:
            self.is_running, self.started_s = True, time.monotonic()
        self.follow()
        return outcome if outcome.status != RUNNING else None


@contextmanager
def watched(progress: "SweepProgress", jobs: Sequence[ForeignJob]) -> Iterator[None]:
    """Show the progress of ``jobs``, run by another project's launcher, during the block."""
    waiting, over = list(jobs), Event()

    def look() -> None:
        for job in list(waiting):
            known, outcome = job.is_running, job.look()
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
