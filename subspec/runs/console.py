"""Console output of a run: progress, notes and warnings, and the table at the end.

A terminal shows a bar. Any other stream (a file, a pipe, a batch system's log) gets one plain line per finished sample,
without control characters. All figures come from records and summaries.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.table import Column
from rich.text import Text

from subspec.records.metrics import add_turn, is_unfinished, speeds, summarise
from subspec.records.summary_table import banners, decimals, summary_table
from subspec.utils.terminal import Terminal

WIDE = 90
"""Columns of a terminal with room for a bar beside all figures."""


class RunConsole(Terminal):
    """Console of one run. All output goes through it, so that no line breaks the bar."""

    @contextmanager
    def progress(self, total: int, done: int = 0, texts: int = 1) -> Iterator["RunProgress"]:
        """Show progress over ``total`` samples, of which earlier sessions finished ``done``; ``texts`` at a time."""
        progress = (_Bar if self.live else RunProgress)(self, total, done, texts)
        with progress.display:
            yield progress

    def table(self, summary: Mapping[str, Any], speedup: Mapping[str, Any] | None = None) -> None:
        """Print the table at the end of a run, with a baseline its speed-up, and the warnings."""
        self.rich.print(summary_table(summary, speedup, self.rich.options))
        for banner in banners(summary):
            self._line(banner, "bold yellow")


class RunProgress:
    """Progress as plain lines, one per finished sample. Base class of the bar.

    Attributes:
        running: number of samples on their way.
    """

    display: AbstractContextManager[Any] = nullcontext()

    def __init__(self, console: RunConsole, total: int, done: int = 0, texts: int = 1) -> None:
        self.console = console
        self.total = total
        self.done = done
        self.texts = texts
        self.running = 0
        self._first = done
        self._started = time.monotonic()
        self._sums: Counter[str] = Counter()
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
        return speeds(self._sums)["tokens_per_s" if self.texts == 1 else "tokens_per_s_together"]

    @property
    def tau(self) -> float | None:
        """Tokens per verification pass of this session so far."""
        return speeds(self._sums)["tau"]

    def rates(self) -> str:
        """Speed, acceptance and answers of this session so far."""
        together = " together" if self.texts > 1 else ""
        text = f"{decimals(self.tokens_per_s)} tokens/s{together}, tau {decimals(self.tau)}"
        return text + (f", correct {self._correct}/{self._checked}" if self._checked else "")

    def turn(self, record: Mapping[str, Any]) -> None:
        """Count a finished turn; nothing is printed."""
        add_turn(self._sums, record)
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
            summary = summarise(turns)
            totals, mismatches = summary["totals"], (summary["audit"] or {}).get("mismatch")
            parts += [
                f"{totals['new_tokens']} tokens",
                f"{decimals(totals['tokens_per_s'])} tokens/s",
                f"tau {decimals(totals['tau'])}",
                f"prefill {totals['prefill_s']:.2f} s",
                f"decode {totals['decode_s']:.2f} s",
            ]
            checked = [record["correct"] for record in turns if record.get("correct") is not None]
            parts += ["correct" if correct else "wrong" for correct in checked]
            parts += ["cut before an answer" for record in turns if is_unfinished(record)]
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

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        bar, console = self, self.console

        class Figures(TextColumn):
            """Text computed at every redraw, so that the clocks advance between samples."""

            def render(self, task: Task) -> Text:
                return Text(bar.figures(), style="default")

        bars = [BarColumn(bar_width=None)] if console.rich.width >= WIDE else []
        self.display = Progress(
            *bars,
            Figures("", table_column=Column(no_wrap=True, overflow="crop")),
            console=console.rich,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self.display.add_task("", total=self.total, completed=self.done)

    def figures(self) -> str:
        """The text beside the bar."""
        left = f"left {clock(self.remaining_s)}"
        if self.console.rich.width < WIDE:
            return f"{self.done}/{self.total}  {decimals(self.tokens_per_s)} tok/s  tau {decimals(self.tau)}  {left}"
        running = f", {self.running} running" if self.texts > 1 else ""
        return f"{self.done}/{self.total} samples{running}  {self.rates()}  {clock(self.elapsed_s)}, {left}"

    def sample_finished(self, *records: Mapping[str, Any]) -> None:
        self.done += 1
        self.display.update(self._task, completed=self.done)
        if any(record.get("skipped") for record in records):
            self.console.note(self.describe(records))


def clock(seconds: float | None) -> str:
    """``H:MM:SS``, or a dash."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
