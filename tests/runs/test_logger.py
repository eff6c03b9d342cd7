import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from subspec.config.schema import NoLoggerConfig, WandbConfig
from subspec.errors import ConfigError
from subspec.records.run_folder import RunFolder, read_records
from subspec.runs.logger import Logger, NoLogger, SafeLogger, describe, make_logger
from tests.helpers.records import CONFIG, record

METHODS = ("start", "log_turn", "log_table", "finish")


class Scripted(Logger):
    """Does ``act`` in the method called ``at``, and remembers its calls."""

    def __init__(self, at: str = "", act: Callable[[], None] = lambda: None) -> None:
        self.at, self.act = at, act
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.abandoned = threading.Event()
        self.note = "scripted"
        self.deadlines_s = dict.fromkeys(METHODS, 5.0)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())
        if name == self.at:
            self.act()

    def start(
        self,
        config: Mapping[str, Any],
        run_dir: Path,
        environment: Mapping[str, Any],
        finished: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._called("start")

    def log_turn(self, record: Mapping[str, Any], step: int) -> None:
        self._called("log_turn")

    def log_table(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._called("log_table")

    def finish(self, summary: Mapping[str, Any] | None, exit_code: int = 0) -> None:
        self._called("finish")

    def abandon(self) -> None:
        self.abandoned.set()


def run_with(logger: SafeLogger, run_dir: Path, turns: int = 3) -> None:
    """What the runner does."""
    with RunFolder.open(run_dir, resume=False, config=CONFIG) as folder:
        logger.start(CONFIG, folder.path, {}, finished=folder.records())
        for index in range(turns):
            folder.append(record(index))
            logger.log_turn(folder.records()[-1], step=len(folder) - 1)
        logger.log_table(folder.records())
        logger.finish({"totals": {}}, 0)


def test_a_healthy_logger_gets_everything_in_order_on_one_thread(tmp_path: Path) -> None:
    inner, warnings = Scripted(), []
    logger = SafeLogger(inner, warnings.append)
    run_with(logger, tmp_path)
    assert inner.calls == ["start", "log_turn", "log_turn", "log_turn", "log_table", "finish"]
    assert len(inner.threads) == 1
    assert (warnings, logger.failure) == ([], None)


def disk_full() -> None:
    raise OSError(28, "No space left on device")


def leave() -> None:
    sys.exit(3)


@pytest.mark.parametrize("at", METHODS)
@pytest.mark.parametrize("act", [disk_full, leave])
def test_no_failure_stops_the_run_or_costs_a_record(tmp_path: Path, at: str, act: Callable[[], None]) -> None:
    inner, warnings = Scripted(at, act), []
    logger = SafeLogger(inner, warnings.append)
    run_with(logger, tmp_path)
    assert len(read_records(tmp_path)[0]) == 3
    assert len(warnings) == 1, "one warning, not one per turn"
    assert at in warnings[0]
    assert "\n" not in warnings[0]
    assert inner.calls.count(at) == 1
    assert inner.calls[-1] == "finish", "what it got until then is closed properly"


@pytest.mark.parametrize("at", METHODS)
def test_no_hang_stops_the_run(tmp_path: Path, at: str) -> None:
    release = threading.Event()
    inner, warnings = Scripted(at, lambda: release.wait(30) and None), []
    inner.deadlines_s = dict.fromkeys(METHODS, 0.1)
    started = time.monotonic()
    run_with(SafeLogger(inner, warnings.append), tmp_path)
    assert time.monotonic() - started < 3
    assert len(read_records(tmp_path)[0]) == 3
    assert len(warnings) == 1
    assert "did not come back within 0.1 s" in warnings[0]
    assert inner.abandoned.wait(3)
    release.set()


def test_what_the_user_must_repair_comes_through_at_the_start() -> None:
    def refuse() -> None:
        raise ConfigError("logger.mode=online, but no key")

    warnings: list[str] = []
    logger = SafeLogger(Scripted("start", refuse), warnings.append)
    with pytest.raises(ConfigError, match="no key"):
        logger.start(CONFIG, Path(), {})
    logger.finish(None, 2)
    assert warnings == []
    later = SafeLogger(Scripted("log_turn", refuse), warnings.append)
    later.start(CONFIG, Path(), {})
    later.log_turn(record(0), 0)
    assert len(warnings) == 1


def test_finishing_twice_or_without_a_start_is_harmless() -> None:
    inner = Scripted()
    logger = SafeLogger(inner, pytest.fail)
    logger.finish(None, 1)
    assert inner.calls == []
    logger.start(CONFIG, Path(), {})
    logger.finish(None, 1)
    logger.finish(None, 1)
    assert inner.calls == ["start", "finish"]


def test_the_logger_of_a_configuration() -> None:
    assert isinstance(make_logger(NoLoggerConfig(name="none"), pytest.fail).inner, NoLogger)
    assert type(make_logger(WandbConfig(name="wandb"), pytest.fail).inner).__name__ == "WandbLogger"


def test_no_logger_does_nothing(tmp_path: Path) -> None:
    logger = make_logger(NoLoggerConfig(name="none"), pytest.fail)
    run_with(logger, tmp_path)
    assert logger.inner.note == ""


def test_errors_are_described_in_one_short_line() -> None:
    text = describe(ValueError("a\nb " + "c" * 500))
    assert text.startswith("ValueError: a b c")
    assert len(text) < 150
    assert describe(KeyboardInterrupt()) == "KeyboardInterrupt"
