import os
import sys
import threading
import time
from pathlib import Path

import pytest

from subspec.config.schema import LoggerConfig, NoLoggerConfig, WandbConfig
from subspec.errors import ConfigError
from subspec.records.run_folder import RunFolder, read_records
from subspec.runs.logger import Logger, NoLogger, SafeLogger, describe, make_logger
from tests.helpers.records import CONFIG, record

METHODS = ("start", "log_turn", "log_table", "finish")


def remembered(name):
    def method(self, *_, **__):
        self.calls.append(name)
        self.threads.add(threading.get_ident())
        if name == self.at:
            self.act()

    return method


class Scripted(Logger):
    """Does ``act`` in the method called ``at``, and remembers its calls."""

    start, log_turn, log_table, finish = map(remembered, METHODS)

    def __init__(self, at="", act=lambda: None, deadline_s=5.0):
        self.at, self.act = at, act
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.abandoned = threading.Event()
        self.abandon = self.abandoned.set
        self.deadlines_s = dict.fromkeys(METHODS, deadline_s)


def run_with(logger, run_dir, turns=3):
    """What the runner does."""
    with RunFolder.open(run_dir, resume=False, config=CONFIG) as folder:
        logger.start(CONFIG, folder.path, {}, finished=folder.records())
        for index in range(turns):
            folder.append(record(index))
            logger.log_turn(folder.records()[-1], step=len(folder) - 1)
        logger.log_table(folder.records())
        logger.finish({"totals": {}}, 0)


def test_a_healthy_logger_gets_everything_in_order_on_one_thread(tmp_path):
    inner, warnings = Scripted(), []
    logger = SafeLogger(inner, warnings.append)
    run_with(logger, tmp_path)
    assert inner.calls == ["start", "log_turn", "log_turn", "log_turn", "log_table", "finish"]
    assert len(inner.threads) == 1
    assert (warnings, logger.failure) == ([], None)


def refuse():
    raise ConfigError("logger.mode=online, but no key")


@pytest.mark.parametrize("at", METHODS)
@pytest.mark.parametrize("act", [lambda: os.listdir("nowhere"), lambda: sys.exit(3)], ids=["raises", "exits"])
def test_no_failure_stops_the_run_or_costs_a_record(tmp_path, at, act):
    inner, warnings = Scripted(at, act), []
    run_with(SafeLogger(inner, warnings.append), tmp_path)
    assert len(read_records(tmp_path)[0]) == 3
    assert len(warnings) == 1, "one warning, not one per turn"
    assert at in warnings[0]
    assert "\n" not in warnings[0]
    assert inner.calls.count(at) == 1
    assert inner.calls[-1] == "finish", "what it got until then is closed properly"


@pytest.mark.parametrize("at", METHODS)
def test_no_hang_stops_the_run(tmp_path, at):
    release = threading.Event()
    inner, warnings = Scripted(at, lambda: release.wait(30), deadline_s=0.1), []
    started = time.monotonic()
    run_with(SafeLogger(inner, warnings.append), tmp_path)
    assert time.monotonic() - started < 3
    assert len(read_records(tmp_path)[0]) == 3
    assert len(warnings) == 1
    assert "did not come back within 0.1 s" in warnings[0]
    assert inner.abandoned.wait(3)
    release.set()


def test_what_the_user_must_repair_comes_through_at_the_start():
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


def test_finishing_twice_or_without_a_start_is_harmless():
    inner = Scripted()
    logger = SafeLogger(inner, pytest.fail)
    logger.finish(None, 1)
    assert inner.calls == []
    logger.start(CONFIG, Path(), {})
    logger.finish(None, 1)
    logger.finish(None, 1)
    assert inner.calls == ["start", "finish"]


def test_the_logger_of_a_configuration(tmp_path):
    assert type(make_logger(WandbConfig(name="wandb"), pytest.fail).inner).__name__ == "WandbLogger"
    logger = make_logger(NoLoggerConfig(name="none"), pytest.fail)
    assert isinstance(logger.inner, NoLogger)
    run_with(logger, tmp_path)
    assert logger.inner.note == ""
    with pytest.raises(ConfigError, match=r"logger=none or logger=wandb"):
        make_logger(LoggerConfig(name="tensorboard"), pytest.fail)


def test_errors_are_described_in_one_short_line():
    text = describe(ValueError("a\nb " + "c" * 500))
    assert text.startswith("ValueError: a b c")
    assert len(text) < 150
    assert describe(KeyboardInterrupt()) == "KeyboardInterrupt"
