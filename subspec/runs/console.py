"""Console output of a run: progress, notes and warnings, and the table at the end.

A terminal shows a bar. Any other stream (a file, a pipe, a batch system's log) gets one plain line per finished sample,
without control characters. All figures come from records and summaries.

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
from rich.table import Column
from rich.text import Text

from subspec.records.metrics import is_unfinished, ratio
from subspec.records.summary_table import SummaryTable, banners, decimals
from subspec.utils.terminal import Terminal

WIDE = 90
"""Columns of a terminal with room for a bar beside all figures."""


class RunConsole(Terminal):
    """Console of one run. All output goes through it, so that no line breaks the bar."""

    @contextmanager
    def progress(self, total: int, done: int = 0, texts: int = 1) -> Iterator["RunProgress"]:
        """Show progress over ``total`` samples, of which earlier sessions finished ``done``.

        Args:
            texts: most texts at a time.
        """
        progress = (_Bar if self.live else RunProgress)(self, total, done, texts)
        try:
            progress.open()
            yield progress
        finally:
            progress.close()

    def table(self, summary: Mapping[str, Any], speedup: Mapping[str, Any] | None = None) -> None:
        """Print the table at the end of a run and its warnings.

        Args:
            summary: of :func:`~subspec.records.metrics.summarise`.
            speedup: of :func:`~subspec.records.metrics.speedup`, with a baseline.
        """
        self.rich.print(SummaryTable(summary, speedup))
        for banner in banners(summary):
            self._line(banner, "bold yellow")


class RunProgress:
    """Progress as plain lines, one per finished sample. Base class of the bar.

    Attributes:
        running: number of samples on their way.
    """

    def __init__(self, console: RunConsole, total: int, done: int = 0, texts: int = 1) -> None:
        self.console = console
        self.total = total
        self.done = done
        self.texts = texts
        self.running = 0
        self._first = done
        self._started = time.monotonic()
        self._seconds = self._loop_s = 0.0
        self._verified = self._new = 0
        self._iterations = 0
        self._checked = self._correct = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since this session began."""
        return time.monotonic() - self._started

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds left, from the mean of this session's samples; None before the first."""
        here = self.done - self._first
        return self.elapsed_s / here * max(self.total - self.done, 0) if here > 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed of this session so far; with several texts at a time, all tokens over the loop's seconds."""
        return ratio(self._verified, self._seconds) if self.texts == 1 else ratio(self._new, self._loop_s)

    @property
    def tau(self) -> float | None:
        """Tokens per verification pass of this session so far."""
        return ratio(self._verified, self._iterations)

    def rates(self) -> str:
        """Speed, acceptance and answers of this session so far."""
        together = " together" if self.texts > 1 else ""
        text = f"{decimals(self.tokens_per_s)} tokens/s{together}, tau {decimals(self.tau)}"
        return text + (f", correct {self._correct}/{self._checked}" if self._checked else "")

    def open(self) -> None:
        """Start the display."""

    def close(self) -> None:
        """Stop the display."""

    def turn(self, record: Mapping[str, Any]) -> None:
        """Count a finished turn; nothing is printed."""
        self._verified += record.get("verified_tokens") or 0
        self._new += record.get("new_tokens") or 0
        self._loop_s += record.get("loop_s") or 0.0
        self._iterations += record.get("iterations") or 0
        self._seconds += record.get("decode_s") or 0.0
        right = record.get("correct")
        self._checked += right is not None
        self._correct += bool(right)

    def sample_finished(self, *records: Mapping[str, Any]) -> None:
        """Count and print a finished sample, given the records of its turns."""
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
                f"{decimals(ratio(sums['verified_tokens'], sums['decode_s']))} tokens/s",
                f"tau {decimals(ratio(sums['verified_tokens'], sums['iterations']))}",
                f"prefill {sums['prefill_s']:.2f} s",
                f"decode {sums['decode_s']:.2f} s",
            ]
            checked = [record["correct"] for record in turns if record.get("correct") is not None]
            parts += ["correct" if correct else "wrong" for correct in checked]
            parts += ["cut before an answer" for record in turns if is_unfinished(record)]
            mismatches = sum((record.get("audit") or {}).get("mismatch") or 0 for record in turns)
            if mismatches:
                parts.append(f"AUDIT: {mismatches} mismatch(es)")
            if self.done - self._first > 1:
                parts.append(f"so far {self.rates()}")
        if skip is not None:
            parts.append(f"skipped: {skip.get('reason', 'unknown')}")
        parts.append(f"elapsed {clock(self.elapsed_s)}, left {clock(self.remaining_s)}")
        return "  ".join(parts)


class _Bar(RunProgress):
    """Progress as a bar with the running figures."""

    def __init__(self, console: RunConsole, total: int, done: int = 0, texts: int = 1) -> None:
        super().__init__(console, total, done, texts)
        bar = self

        class Figures(TextColumn):
            """Text computed at every redraw, so that the clocks advance between samples."""

            def render(self, task: Task) -> Text:
                return Text(bar.figures(), style="default")

        bars = [BarColumn(bar_width=None)] if console.rich.width >= WIDE else []
        self._progress = Progress(
            *bars,
            Figures("", table_column=Column(no_wrap=True, overflow="crop")),
            console=console.rich,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total, completed=done)

    def figures(self) -> str:
        """The text beside the bar."""
        left = f"left {clock(self.remaining_s)}"
        if self.console.rich.width < WIDE:
            return f"{self.done}/{self.total}  {decimals(self.tokens_per_s)} tok/s  tau {decimals(self.tau)}  {left}"
        running = f", {self.running} running" if self.texts > 1 else ""
        return f"{self.done}/{self.total} samples{running}  {self.rates()}  {clock(self.elapsed_s)}, {left}"

    def open(self) -> None:
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()

    def sample_finished(self, *records: Mapping[str, Any]) -> None:
        self.done += 1
        self._progress.update(self._task, completed=self.done)
        if any(record.get("skipped") for record in records):
            self.console.note(self.describe(records))


def clock(seconds: float | None) -> str:
    """``H:MM:SS``, or a dash."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
