"""Where a run's series go besides its own folder, behind one interface that can never hurt the run.

The run folder is the truth; a logger is a convenience. So the runner only ever holds a :class:`SafeLogger`: every
call of the logger proper happens on a worker thread with a deadline, and whatever it does (raise, exit, hang, find
the disk full), the run prints one warning and goes on without it. The only failure that stops a run is one that the
user asked to be told about, before anything is loaded: ``logger.mode=online`` where there is no way to go online.

Example::

    logger = make_logger(cfg.logger, warn=console.warn)
    logger.start(config, folder.path, environment, finished=folder.records())
    console.note(logger.note)
    try:
        logger.log_turn(record, step=len(folder) - 1)
        logger.log_table(folder.records())
    finally:
        logger.finish(summary, exit_code)
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subspec.config.schema import LoggerConfig, NoLoggerConfig, WandbConfig
from subspec.errors import ConfigError, SubspecError

ABANDON_S = 5.0
"""Seconds that letting go of a logger that hangs may take."""


class Logger(ABC):
    """Takes a run's configuration, its turns, and at the end its table and summary.

    Attributes:
        note: one line for the console about where the series go; empty when there is nothing to say.
        deadlines_s: seconds that each method may take before the run goes on without the logger.
    """

    note: str = ""
    deadlines_s: Mapping[str, float] = {"start": 60.0, "log_turn": 30.0, "log_table": 60.0, "finish": 120.0}

    @abstractmethod
    def start(
        self,
        config: Mapping[str, Any],
        run_dir: Path,
        environment: Mapping[str, Any],
        finished: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Begin. ``finished``: the records that a resumed run already holds, in the order of their positions."""

    @abstractmethod
    def log_turn(self, record: Mapping[str, Any], step: int) -> None:
        """One finished turn. ``step``: its position in the run folder, from 0."""

    @abstractmethod
    def log_table(self, records: Sequence[Mapping[str, Any]]) -> None:
        """All records, once, at the end."""

    @abstractmethod
    def finish(self, summary: Mapping[str, Any] | None, exit_code: int = 0) -> None:
        """End. ``summary``: of :func:`~subspec.records.metrics.summarise`, None when the run never got there."""

    def abandon(self) -> None:  # noqa: B027 - most loggers hold nothing
        """Let go of everything at once, after a call that never came back."""


class NoLogger(Logger):
    """Only the run folder."""

    def start(
        self,
        config: Mapping[str, Any],
        run_dir: Path,
        environment: Mapping[str, Any],
        finished: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Nothing to do."""

    def log_turn(self, record: Mapping[str, Any], step: int) -> None:
        """Nothing to do."""

    def log_table(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Nothing to do."""

    def finish(self, summary: Mapping[str, Any] | None, exit_code: int = 0) -> None:
        """Nothing to do."""


class SafeLogger(Logger):
    """Guards another logger: at most one warning line, no exception, no hang.

    Calls run one after another on one daemon thread. A call that raises switches the logger off, but it is still
    finished at the end. A call that outlives its deadline leaves the thread to itself: the logger is abandoned.

    Attributes:
        failure: why the logger was switched off; None while all is well.
    """

    def __init__(self, inner: Logger, warn: Callable[[str], None]) -> None:
        self.inner = inner
        self.failure: str | None = None
        self._warn = warn
        self._hung = False
        self._started = False
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], _Outcome] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def note(self) -> str:  # type: ignore[override]
        """The guarded logger's note."""
        return self.inner.note

    @property
    def name(self) -> str:
        """What to call the guarded logger in a message."""
        return type(self.inner).__name__.removesuffix("Logger")

    def start(
        self,
        config: Mapping[str, Any],
        run_dir: Path,
        environment: Mapping[str, Any],
        finished: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """As the logger's own.

        Raises:
            SubspecError: the configuration asks for what cannot be had (nothing else comes through).
        """
        self._started = True
        self._call("start", lambda: self.inner.start(config, Path(run_dir), environment, finished))

    def log_turn(self, record: Mapping[str, Any], step: int) -> None:
        """As the logger's own; nothing once it has failed."""
        if self.failure is None:
            self._call("log_turn", lambda: self.inner.log_turn(record, step))

    def log_table(self, records: Sequence[Mapping[str, Any]]) -> None:
        """As the logger's own; nothing once it has failed."""
        if self.failure is None:
            self._call("log_table", lambda: self.inner.log_table(records))

    def finish(self, summary: Mapping[str, Any] | None, exit_code: int = 0) -> None:
        """As the logger's own; after a failure too, so that what it got is kept. Only the first call counts."""
        if self._started and not self._hung:
            self._started = False
            self._call("finish", lambda: self.inner.finish(summary, exit_code))
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    def _call(self, name: str, call: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._calls,), name="logger", daemon=True)
            self._thread.start()
        outcome = _Outcome()
        self._calls.put((call, outcome))
        if not outcome.done.wait(self.inner.deadlines_s[name]):
            self._hung = True
            self._fail(f"{name} did not come back within {self.inner.deadlines_s[name]:g} s")
            # On a thread of its own, and not waited for without end: what hangs may hold a lock it needs.
            thread = threading.Thread(target=self._abandon, name="logger-abandon", daemon=True)
            thread.start()
            thread.join(ABANDON_S)
            return
        if name == "start" and isinstance(outcome.error, SubspecError):
            self._started = False
            raise outcome.error
        if outcome.error is not None:
            self._fail(f"{name} failed: {describe(outcome.error)}")

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            self._warn(f"{self.name} logger: {reason}; going on without it, the run folder has every record")

    def _abandon(self) -> None:
        try:
            self.inner.abandon()
        except BaseException:
            return  # the warning has been printed; there is nothing left to lose


def make_logger(config: LoggerConfig, warn: Callable[[str], None]) -> SafeLogger:
    """The logger of a configuration, guarded. ``warn`` prints one line.

    Raises:
        ConfigError: no such logger.
    """
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


class _Outcome:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None


def _work(calls: "queue.SimpleQueue[tuple[Callable[[], None], _Outcome] | None]") -> None:
    while (item := calls.get()) is not None:
        call, outcome = item
        try:
            call()
        except BaseException as error:  # libraries also leave through sys.exit
            outcome.error = error
        finally:
            outcome.done.set()
