"""Loggers of a run's series besides the run folder, behind one interface that cannot fail the run.

The run folder is authoritative. The runner holds a :class:`SafeLogger`, which calls the actual logger on a worker
thread with a deadline. If the logger raises, exits, hangs or fills the disk, the run prints one warning and
continues without it. One failure stops a run, before anything is loaded: ``logger.mode=online`` without a way to go
online.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from subspec.config.schema import LoggerConfig, NoLoggerConfig, WandbConfig
from subspec.errors import ConfigError, SubspecError

ABANDON_S = 5.0
"""Seconds that abandoning a hanging logger may take."""

Fields = Mapping[str, Any]
"""A record, a summary, a configuration or an environment."""

Calls = queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None]


class Logger:
    """Receives a run's configuration, its turns, and at the end its table and summary. This class ignores them.

    Attributes:
        note: one line for the console about the destination; empty without one.
        deadlines_s: seconds that each method may take before the run continues without the logger.
    """

    note: str = ""
    deadlines_s: Mapping[str, float] = {"start": 60.0, "log_turn": 30.0, "log_table": 60.0, "finish": 120.0}

    def start(self, config: Fields, run_dir: Path, environment: Fields, finished: Sequence[Fields] = ()) -> None:
        """Begin. ``finished``: records of a resumed run in the order of their positions."""

    def log_turn(self, record: Fields, step: int) -> None:
        """Log a finished turn. ``step``: its position in the run folder, from 0."""

    def log_table(self, records: Sequence[Fields]) -> None:
        """Log all records, once at the end."""

    def finish(self, summary: Fields | None, exit_code: int = 0) -> None:
        """End. ``summary``: of :func:`~subspec.records.metrics.summarise`; None if the run did not finish."""

    def abandon(self) -> None:
        """Release all resources at once, after a call that did not return."""


class NoLogger(Logger):
    """Only the run folder."""


class SafeLogger:
    """Guards a logger: at most one warning line, no exception, no hang.

    Calls run in order on one daemon thread. A call that raises switches the logger off, except for its ``finish``. A
    call that exceeds its deadline keeps the thread, and the logger is abandoned.

    Attributes:
        failure: why the logger was switched off; None otherwise.
    """

    def __init__(self, inner: Logger, warn: Callable[[str], None]) -> None:
        self.inner = inner
        self.failure: str | None = None
        self._warn = warn
        self._hung = False
        self._started = False
        self._calls: Calls = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, config: Fields, run_dir: Path, environment: Fields, finished: Sequence[Fields] = ()) -> None:
        """Call the logger's own. Raises SubspecError as that does; other exceptions become a warning."""
        self._started = True
        self._call("start", lambda: self.inner.start(config, run_dir, environment, finished))

    def log_turn(self, record: Fields, step: int) -> None:
        """Call the logger's own, unless it has failed."""
        if self.failure is None:
            self._call("log_turn", lambda: self.inner.log_turn(record, step))

    def log_table(self, records: Sequence[Fields]) -> None:
        """Call the logger's own, unless it has failed."""
        if self.failure is None:
            self._call("log_table", lambda: self.inner.log_table(records))

    def finish(self, summary: Fields | None, exit_code: int = 0) -> None:
        """Call the logger's own once, also after a failure, so that logged turns are kept."""
        if self._started and not self._hung:
            self._started = False
            self._call("finish", lambda: self.inner.finish(summary, exit_code))
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    def _call(self, name: str, call: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = _daemon(lambda: _work(self._calls))
        outcome: Future[None] = Future()
        self._calls.put((call, outcome))
        try:
            error = outcome.exception(self.inner.deadlines_s[name])
        except TimeoutError:
            self._hung = True
            self._fail(f"{name} did not come back within {self.inner.deadlines_s[name]:g} s")
            # On a thread with a deadline: the hanging call may hold a lock. The warning has been printed already.
            _daemon(self.inner.abandon).join(ABANDON_S)
            return
        if name == "start" and isinstance(error, SubspecError):
            self._started = False
            raise error
        if error is not None:
            self._fail(f"{name} failed: {describe(error)}")

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            name = type(self.inner).__name__.removesuffix("Logger")
            self._warn(f"{name} logger: {reason}; going on without it, the run folder has every record")


def make_logger(config: LoggerConfig, warn: Callable[[str], None]) -> SafeLogger:
    """The logger of a configuration, guarded. ``warn`` prints one line."""
    if isinstance(config, WandbConfig):
        from subspec.runs.wandb_logger import WandbLogger

        return SafeLogger(WandbLogger(config), warn)
    if isinstance(config, NoLoggerConfig):
        return SafeLogger(NoLogger(), warn)
    raise ConfigError(f"logger.name={config.name} is not known: use logger=none or logger=wandb")


def describe(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 120 else text[:117] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _daemon(call: Callable[[], None]) -> threading.Thread:
    """Start a thread that holds up no exit and prints no exception."""

    def run() -> None:
        with contextlib.suppress(BaseException):
            call()

    thread = threading.Thread(target=run, name="logger", daemon=True)
    thread.start()
    return thread


def _work(calls: Calls) -> None:
    while (item := calls.get()) is not None:
        call, outcome = item
        try:
            outcome.set_result(call())
        except BaseException as error:  # libraries also leave through sys.exit
            outcome.set_exception(error)
