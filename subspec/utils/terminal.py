"""Lines for people: styled on a terminal, plain and without control characters anywhere else."""

import io
import os
import sys
from typing import TextIO

from rich.console import Console
from rich.text import Text

PLAIN_WIDTH = 100
"""Columns of the final table where there is no terminal to ask."""


class Terminal:
    """Prints lines for people, on a terminal or into a file.

    Args:
        file: where to print; standard output when None.
        width: columns; the terminal's own when None.
    """

    def __init__(self, file: TextIO | None = None, width: int | None = None) -> None:
        stream = file if file is not None else sys.stdout
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="replace")  # a sample's name must not end the run
        # Asked of the stream itself: rich also believes FORCE_COLOR, which batch systems set for log files.
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
        """One line that a person should read."""
        self._line(f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """One line that says why the run stops."""
        self._line(f"error: {text}", "bold red")

    def _line(self, text: str, style: str) -> None:
        text = one_line(text)
        if text:
            # A log file wants one line per message; a terminal wraps by itself, and wraps words with rich.
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
