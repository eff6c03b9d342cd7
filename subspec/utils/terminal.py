"""Console lines: styled on a terminal, plain and without control characters elsewhere."""

import io
import os
import sys
from typing import TextIO

from rich.console import Console
from rich.text import Text

PLAIN_WIDTH = 100
"""Columns of the final table without a terminal."""


class Terminal:
    """Prints lines to ``file`` (None: standard output), ``width`` columns wide (None: the terminal's)."""

    def __init__(self, file: TextIO | None = None, width: int | None = None) -> None:
        stream = file if file is not None else sys.stdout
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="replace")  # a sample's name must not end the run
        # Not rich's own test, which obeys FORCE_COLOR: batch systems set it for log files.
        self.live = _is_terminal(stream)
        if width is None and not self.live:
            width = _columns_from_environment() or PLAIN_WIDTH
        self.rich = Console(
            file=file,
            width=width,
            force_terminal=self.live,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=False,
        )

    def note(self, text: str) -> None:
        """One line of information; an empty text prints nothing."""
        self._line(text, "dim")

    def warn(self, text: str) -> None:
        """One warning."""
        self._line(f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """One line with the reason why the run stops."""
        self._line(f"error: {text}", "bold red")

    def _line(self, text: str, style: str) -> None:
        text = one_line(text)
        if text:
            # One line per message in a log file; on a terminal rich wraps at words.
            self.rich.print(Text(text, style=style), soft_wrap=not self.live)


def one_line(text: str) -> str:
    """``text`` on one line and without control characters: ids and messages come from data and libraries."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text).strip()


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # a closed or a half-made stream
        return False


def _columns_from_environment() -> int | None:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdigit() and int(columns) > 0 else None
