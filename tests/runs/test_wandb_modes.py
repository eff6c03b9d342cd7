"""How the W&B logger decides and numbers its rows, against a stand-in for the library."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from subspec.config.schema import WandbConfig, WandbMode
from subspec.errors import ConfigError
from subspec.records.metrics import summarise
from subspec.runs import wandb_logger
from subspec.runs.logger import SafeLogger
from subspec.runs.wandb_logger import COLUMNS, WandbLogger, run_name
from subspec.runs.wandb_service import drop_service, reachable
from tests.helpers.records import CONFIG, record

from .test_logger import run_with

ROOT = Path(__file__).parents[2]


class FakeWandb:
    """The library's surface that we use, in memory; ``init`` does what ``script`` says for its mode."""

    def __init__(self, **script):
        self.script = script
        self.inits, self.rows, self.exit_codes, self.summary = [], [], [], {}
        self.api = SimpleNamespace(api_key="0123456789abcdef" * 3)
        fields = {"silent": None, "console": None, "init_timeout": None}
        self.Settings = type("Settings", (SimpleNamespace,), {"model_fields": fields})
        self.setup = lambda settings=None: SimpleNamespace(settings=SimpleNamespace(base_url="http://127.0.0.1:9"))
        self.plot = SimpleNamespace(line=lambda table, x, y, title: ("plot", table))
        self.Image, self.Table = (lambda picture: picture.size), (lambda columns, data: (columns, data))

    def init(self, **arguments):
        self.inits.append(arguments)
        action = self.script.get(arguments["mode"])
        if isinstance(action, BaseException):
            raise action
        return SimpleNamespace(
            define_metric=lambda *a, **k: None,
            log=lambda row, step: self.rows.append((step, row)),
            finish=lambda exit_code: self.exit_codes.append(exit_code),
            summary=self.summary,
            dir=f"{arguments['dir']}/wandb/offline-run-1/files",
            url="https://wandb.example.invalid/tests/runs/1",
            **(action or {}),
        )


@pytest.fixture
def fake(monkeypatch, request):
    library = FakeWandb(**getattr(request, "param", {}))
    monkeypatch.setattr(wandb_logger, "import_wandb", lambda: library)
    monkeypatch.setattr(wandb_logger, "reachable", lambda host, timeout: True)
    monkeypatch.setattr(wandb_logger, "drop_service", lambda library: None)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return library


def make(mode=WandbMode.auto):
    return WandbLogger(WandbConfig(name="wandb", mode=mode))


@pytest.mark.parametrize("fake", [{"online": {"resumed": True, "step": 2}}], indirect=True)
def test_online_a_resumed_run_continues_where_the_service_stands(fake, tmp_path):
    logger = make()
    (tmp_path / "wandb_run.json").write_text('{"id": "abc123"}')
    logger.start(CONFIG, tmp_path, {}, finished=[record(n) for n in range(4)])
    logger.log_turn(record(4), 4)
    logger.log_table([record(n) for n in range(5)])
    logger.finish(summarise([record(0)]), 7)
    assert fake.inits[0]["id"] == "abc123"
    assert fake.inits[0]["resume"] == "allow"
    assert [step for step, row in fake.rows if "tau" in row] == [2, 3, 4], "what the service lacks is sent again"
    assert "run abc123 continued" in logger.note
    assert [step for step, _ in fake.rows] == sorted({step for step, _ in fake.rows}), "no row goes back or clashes"
    assert fake.exit_codes == [7]
    assert logger.mode == "online"


@pytest.mark.parametrize("fake", [{"online": {"resumed": True, "step": 4}}], indirect=True)
def test_rows_that_the_table_took_are_stepped_over(fake, tmp_path):
    """An earlier session logged its table at row 2 and its plot at row 3, and then one more turn runs."""
    logger = make()
    logger.start(CONFIG, tmp_path, {}, finished=[record(0), record(1)])
    logger.log_turn(record(2), 2)
    logger.log_turn(record(3), 3)
    assert [step for step, _ in fake.rows] == [4, 5]


@pytest.mark.parametrize("fake", [{"online": RuntimeError("the key is not known")}], indirect=True)
def test_a_refused_key_goes_offline_unless_online_was_asked_for(fake, tmp_path):
    logger = make()
    logger.start(CONFIG, tmp_path, {})
    assert [arguments["mode"] for arguments in fake.inits] == ["online", "offline"]
    assert "the key is not known" in logger.note
    with pytest.raises(ConfigError, match="the key is not known"):
        make(WandbMode.online).start(CONFIG, tmp_path, {})


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("fake", [{"online": RuntimeError("no"), "offline": FULL}], indirect=True)
def test_when_nothing_works_the_run_goes_on(fake, tmp_path):
    warnings = []
    run_with(SafeLogger(make(), warnings.append), tmp_path)
    (warning,) = warnings
    assert "No space left on device" in warning


def test_the_run_is_closed_even_if_its_summary_fails(fake, tmp_path):
    logger = make(WandbMode.offline)
    logger.start(CONFIG, tmp_path, {})
    with pytest.raises(KeyError):
        logger.finish({}, 1)
    assert fake.exit_codes == [1]


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_auto_heeds_the_librarys_own_switch(fake, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    logger = make()
    logger.start(CONFIG, tmp_path, {})
    logger.log_turn(record(0), 0)
    logger.log_table([record(0)])
    logger.finish(summarise([record(0)]))
    assert (logger.mode, bool(fake.rows)) == (mode, mode == "offline")
    assert "WANDB_MODE" in logger.note


def test_skipped_prompts_are_in_the_table_but_not_in_the_series(fake, tmp_path):
    logger = make(WandbMode.offline)
    logger.start(CONFIG, tmp_path, {})
    skipped = {"sample_id": "s9", "sample_index": 9, "turn": 0, "skipped": {"reason": "prompt_too_long"}}
    logger.log_turn(skipped, 0)
    assert fake.rows == []
    logger.log_table([skipped])
    assert fake.rows[0][1]["samples"][1][0][COLUMNS.index("skipped")] == "prompt_too_long"


def test_names_for_people():
    assert run_name(CONFIG) == "tiny subspec-hqq4 gsm8k seed3"
    plain = {**CONFIG, "draft": {"name": "none"}}
    assert run_name(plain) == "tiny none gsm8k seed3"


def test_a_proxy_is_not_second_guessed(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name in [name for name in os.environ if "proxy" in name.lower()]:
            monkeypatch.delenv(name)
        assert reachable(f"http://127.0.0.1:{port}", 1.0)
    assert not reachable(f"http://127.0.0.1:{port}", 1.0)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert reachable(f"http://127.0.0.1:{port}", 1.0)


def test_dropping_the_service_ends_its_helper_process_and_no_other(tmp_path):
    torn = []
    programs = [shutil.copy(shutil.which("sleep"), tmp_path / name) for name in ("wandb-core", "another")]
    helper, other = processes = [subprocess.Popen([program, "60"]) for program in programs]
    try:
        drop_service(SimpleNamespace(teardown=lambda: torn.append(True) or sys.exit(1)))
        assert helper.wait(timeout=10) != 0
        assert other.poll() is None
        assert torn
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_library_is_not_imported_before_it_is_used():
    code = "import sys, subspec.runs.wandb_logger, subspec.runs.logger; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
