"""Progress of a sweep: its jobs, followed by the files that they write, and what the console shows of them.

A terminal shows a redrawn block of lines at the bottom. Any other stream (a file, a pipe, a batch system's log) gets
plain lines: when a job starts or ends, and in between for new figures, at most every few seconds.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from threading import Event, Thread
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from subspec.records.metrics import add_turn, speeds
from subspec.records.outcome import INTERRUPTED, LOG, OK, RUNNING, Outcome, read_outcome
from subspec.records.run_files import RECORDS
from subspec.records.summary_table import decimals
from subspec.runs.console import RunConsole, clock
from subspec.utils.terminal import one_line

QUIET_S = 10.0  # least seconds between two plain lines about running jobs
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
        return speeds(self.sums)["tokens_per_s"]

    @property
    def tau(self) -> float | None:
        """Tokens per target pass so far."""
        return speeds(self.sums)["tau"]

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
            add_turn(self.sums, record)
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


class SweepProgress:
    """Progress over all jobs of a sweep.

    Args:
        total: jobs of the whole sweep.
        finished: those that earlier sessions have finished.
    """

    def __init__(self, total: int = 0, finished: int = 0, console: RunConsole | None = None) -> None:
        self.console = console or RunConsole()
        self.total = total
        self.finished_before = finished
        self.ended = self.failed = 0
        self._began, self._last_line = time.monotonic(), 0.0
        self._live: Live | None = None
        self._running: Sequence[FollowedJob] = ()
        self._waiting: Sequence[str] = ()
        self._took: list[tuple[str, float]] = []
        self._said: dict[str, str] = {}

    @contextmanager
    def shown(self) -> Iterator[Self]:
        """Display progress during the block."""
        if not self.console.live:
            yield self
            return
        with Live(console=self.console.rich, get_renderable=self._block, refresh_per_second=2, transient=True) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds left, from this session's jobs that are most alike; None before there is any."""
        known = [*self._took, *((job.label, job.expected_s) for job in self._running if job.expected_s)]
        if not known:
            return None
        others = max(self.total - self.finished_before - self.ended - len(self._running) - len(self._waiting), 0)
        left = sum(_alike(label, known) for label in self._waiting) + others * _alike("", known)
        left += sum(max((job.expected_s or _alike(job.label, known)) - job.seconds, 0.0) for job in self._running)
        return left / max(len(self._running), 1)

    def started(self, job: FollowedJob) -> None:
        """Report the start of a job."""
        self._line("start", f"{describe(job)}, log: {job.folder / LOG}")

    def finished(self, job: FollowedJob, outcome: Outcome) -> None:
        """Report the end of a job."""
        self._running = [other for other in self._running if other is not job]
        self.ended += 1
        self.failed += outcome.status not in (OK, INTERRUPTED)
        told = outcome.reason
        if outcome.status == OK:
            self._took.append((job.label, outcome.seconds))
            told = f"{figures(job)}  {clock(outcome.seconds)}"
        self._line(outcome.status, f"{describe(job)}  {told}  ({self._clocks()})")

    def update(self, running: Sequence[FollowedJob], waiting: Sequence[str] = ()) -> None:
        """Update the figures of the running jobs, and the labels of the waiting ones."""
        self._running, self._waiting = list(running), list(waiting)
        if self._live is not None or time.monotonic() - self._last_line < QUIET_S:
            return
        for job in running:
            text = figures(job)
            if job.done and self._said.get(job.label) != text:
                self._said[job.label] = text
                self._line("running", f"{describe(job)}  {text}  ({self._clocks()})")

    def _line(self, event: str, text: str) -> None:
        self._last_line = time.monotonic()
        count = f"[{self.finished_before + self.ended}/{self.total}]"
        self.console.rich.print(Text(one_line(f"{count} {event:<8} {text}")), soft_wrap=not self.console.live)

    def _block(self) -> Group:
        """The lines at the bottom of a terminal."""
        width = max(20, self.console.rich.width)
        done = self.finished_before + self.ended
        begun = sum(job.done / job.total for job in self._running if job.total)
        filled = int(24 * (done + begun) / max(self.total, 1))
        failed = f", {self.failed} failed" if self.failed else ""
        lines = [f"{'█' * filled}{'░' * (24 - filled)} {done}/{self.total} jobs{failed}  {self._clocks()}"]
        for job in self._running:  # a long line keeps its figures; the job's number identifies it
            told = f"  {figures(job)}  {clock(job.seconds)}"
            name = f"  {one_line(describe(job))}"
            room = max(width - 1 - len(told), 10)
            lines.append((name if len(name) <= room else f"{name[: room - 1]}…") + told)
        return Group(*(Text(line[: width - 1]) for line in lines))

    def _clocks(self) -> str:
        return f"elapsed {clock(time.monotonic() - self._began)}, left {clock(self.remaining_s)}"


def describe(job: FollowedJob) -> str:
    """Number, GPU and label of a job."""
    gpu = f" on GPU {job.gpu}" if job.gpu is not None else ""
    return f"job {job.folder.name}{gpu}: {job.label}"


def figures(job: FollowedJob) -> str:
    """Progress and speed of a job."""
    if not job.done:
        return "starting"
    return f"{job.done}/{job.total} samples  {decimals(job.tokens_per_s)} tokens/s  tau {decimals(job.tau)}"


def _alike(label: str, known: Sequence[tuple[str, float]]) -> float:
    """Mean seconds of the jobs whose labels share most groups, then most keys, with ``label``."""
    wanted = set(label.split())

    def likeness(other: str) -> tuple[int, int]:
        shared = wanted & set(other.split())
        return sum("." not in word.partition("=")[0] for word in shared), len(shared)

    best = max(likeness(other) for other, _ in known)
    return mean(seconds for other, seconds in known if likeness(other) == best)


@contextmanager
def watched(progress: SweepProgress, jobs: Sequence[ForeignJob]) -> Iterator[None]:
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
