"""Notes and progress while a target is fetched and loaded."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import huggingface_hub.utils as hub_utils
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from transformers.utils import logging as transformers_logging

Note = Callable[[str], None]
"""Prints one line for the user."""

PLAIN_INTERVAL_S = 10.0
"""Seconds between two progress lines where there is no terminal."""


def print_note(text: str) -> None:
    """The default :data:`Note`: a line on standard error."""
    print(text, file=sys.stderr, flush=True)


class ByteProgress:
    """Progress of a known number of bytes: a bar on a terminal, an occasional line elsewhere."""

    def __init__(self, label: str, total: int, note: Note) -> None:
        self._label, self._total, self._note = label, total, note
        self._bar: Progress | None = None
        self._spoke = time.monotonic()
        console = Console(file=sys.stderr)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> "ByteProgress":
        if self._bar:
            self._bar.start()
        else:
            self._note(f"{self._label} ({self._total / 1e6:.0f} MB)")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """``done`` bytes have arrived so far."""
        if self._bar:
            self._bar.update(self._task, completed=min(done, self._total))
        elif time.monotonic() - self._spoke >= PLAIN_INTERVAL_S:
            self._spoke = time.monotonic()
            self._note(f"{self._label}: {done / 1e6:.0f} of {self._total / 1e6:.0f} MB")


@contextmanager
def working(text: str, note: Note) -> Iterator[None]:
    """Announce a long step: a spinner on a terminal, one line elsewhere."""
    console = Console(file=sys.stderr)  # this very stream: callers may redirect sys.stderr meanwhile
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        note(text)
        yield


@contextmanager
def quiet_libraries(*, bars: bool = False) -> Iterator[None]:
    """Silence the logs of transformers and the hub client; the earlier settings are restored.

    Args:
        bars: keep their progress bars if standard error is a terminal.
    """
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    hub_had_bars = not hub_utils.are_progress_bars_disabled()
    hub_verbosity = hub_utils.logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    hub_utils.logging.set_verbosity(hub_utils.logging.CRITICAL)
    if not (bars and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()
        hub_utils.disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_utils.logging.set_verbosity(hub_verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
        if hub_had_bars:
            hub_utils.enable_progress_bars()
