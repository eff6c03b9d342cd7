"""What a person sees: progress while the run goes on, notes and warnings, and the table at its end.

On a terminal there is a bar; anywhere else (a file, a pipe, a batch system's log) one plain line per finished
sample, without control characters. Everything is computed from records and summaries, never from a model.

Example::

    console = RunConsole()
    with console.progress(total=20, done=folder_samples) as progress:
        progress.turn(record)
        progress.sample_finished(record)
    console.table(summary)
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.text import Text

from subspec.records.metrics import ratio
from subspec.records.table import banners, summary_table
from subspec.utils.terminal import Terminal


class RunConsole(Terminal):
    """Prints for one run. All output of the project goes through it, so that nothing breaks the bar."""

    @contextmanager
    def progress(self, total: int, done: int = 0) -> Iterator["RunProgress"]:
        """Show progress over ``total`` samples, ``done`` of which an earlier session has finished."""
        progress = _Bar(self, total, done) if self.live else RunProgress(self, total, done)
        try:
            progress.open()
            yield progress
        finally:
            progress.close()

    def table(self, summary: Mapping[str, Any], speedup: Mapping[str, Any] | None = None) -> None:
        """The table at the end of a run, and what must be known to read it.

        Args:
            summary: of :func:`~subspec.records.metrics.summarise`.
            speedup: of :func:`~subspec.records.metrics.speedup`, when there is a baseline.
        """
        self.rich.print(summary_table(summary, speedup))
        for banner in banners(summary):
            self._line(banner, "bold yellow")


class RunProgress:
    """Progress as plain lines, one per finished sample. Base of the bar."""

    def __init__(self, console: RunConsole, total: int, done: int = 0) -> None:
        self.console = console
        self.total = total
        self.done = done
        self._first = done
        self._started = time.monotonic()
        self._seconds = 0.0
        self._verified = 0
        self._iterations = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since this session began."""
        return time.monotonic() - self._started

    @property
    def remaining_s(self) -> float | None:
        """Seconds left, if the samples to come take as long as this session's; None before its first one."""
        here = self.done - self._first
        return self.elapsed_s / here * max(self.total - self.done, 0) if here > 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed of this session so far."""
        return ratio(self._verified, self._seconds)

    @property
    def tau(self) -> float | None:
        """Tokens per verification pass of this session so far."""
        return ratio(self._verified, self._iterations)

    def open(self) -> None:
        """Begin to show."""

    def close(self) -> None:
        """Stop showing."""

    def turn(self, record: Mapping[str, Any]) -> None:
        """Count a finished turn; nothing is printed."""
        self._verified += record.get("verified_tokens") or 0
        self._iterations += record.get("iterations") or 0
        self._seconds += record.get("decode_s") or 0.0

    def sample_finished(self, *records: Mapping[str, Any]) -> None:
        """A sample is done: the records of all its turns (or of its being skipped)."""
        self.done += 1
        self.console._line(self.describe(records), "")

    def describe(self, records: Sequence[Mapping[str, Any]]) -> str:
        """A finished sample as one line."""
        parts = [f"[{self.done}/{self.total}] {records[0]['sample_id'] if records else ''}".rstrip()]
        skip = next((record["skipped"] for record in records if record.get("skipped")), None)
        turns = [record for record in records if not record.get("skipped")]
        if turns:
            sums = {
                name: sum(record.get(name) or 0 for record in turns)
                for name in ("new_tokens", "verified_tokens", "iterations", "decode_s", "prefill_s")
            }
            parts += [
                f"{sums['new_tokens']} tokens",
                f"{number(ratio(sums['verified_tokens'], sums['decode_s']))} tokens/s",
                f"tau {number(ratio(sums['verified_tokens'], sums['iterations']))}",
                f"prefill {sums['prefill_s']:.2f} s",
                f"decode {sums['decode_s']:.2f} s",
            ]
            parts += ["correct" if record["correct"] else "wrong" for record in turns if _checked(record)]
            mismatches = sum((record.get("audit") or {}).get("mismatch") or 0 for record in turns)
            if mismatches:
                parts.append(f"AUDIT: {mismatches} mismatch(es)")
        if skip is not None:
            parts.append(f"skipped: {skip.get('reason', 'unknown')}")
        parts.append(f"elapsed {clock(self.elapsed_s)}, left {clock(self.remaining_s)}")
        return "  ".join(parts)


class _Bar(RunProgress):
    """Progress as a bar with the running figures."""

    def __init__(self, console: RunConsole, total: int, done: int = 0) -> None:
        super().__init__(console, total, done)
        bar = self

        class Figures(TextColumn):
            """Computed when drawn, so that the clocks run between two samples."""

            def render(self, task: Task) -> Text:
                return Text(bar.figures(), style="default")

        self._progress = Progress(
            BarColumn(bar_width=None),
            Figures(""),
            console=console.rich,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total, completed=done)

    def figures(self) -> str:
        """The text beside the bar."""
        return (
            f"{self.done}/{self.total} samples  {number(self.tokens_per_s)} tok/s  tau {number(self.tau)}  "
            f"{clock(self.elapsed_s)}, left {clock(self.remaining_s)}"
        )

    def open(self) -> None:
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()

    def sample_finished(self, *records: Mapping[str, Any]) -> None:
        self.done += 1
        self._progress.update(self._task, completed=self.done)
        if any(record.get("skipped") for record in records):
            self.console.note(self.describe(records))


def _checked(record: Mapping[str, Any]) -> bool:
    return record.get("correct") is not None


def number(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def clock(seconds: float | None) -> str:
    """``H:MM:SS``, or a dash."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
