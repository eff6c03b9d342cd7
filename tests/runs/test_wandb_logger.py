import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # makes the font cache, if there is none
import pytest

from subspec.config.schema import WandbConfig, WandbMode
from subspec.records.metrics import LinkInfo, summarise
from subspec.report import run_figures  # noqa: F401  (likewise)
from subspec.runs.logger import make_logger
from subspec.runs.wandb_logger import COLUMNS, SERIES, flat_summary
from tests.helpers.cli import Forked
from tests.helpers.records import CONFIG, record
from tests.runs.wandb_run import log_run

from . import wandb_file

wandb = pytest.importorskip("wandb")
KEY = "0123456789abcdef" * 3


def clean_environment(root: Path, **more: str) -> dict[str, str]:
    """No key, no proxy, and every folder that the library writes inside ``root``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("WANDB_") and "proxy" not in name.lower()
    }
    home = root / "home"
    home.mkdir(parents=True)
    folders = {f"WANDB_{name}_DIR": str(home / name.lower()) for name in ("CACHE", "DATA", "CONFIG")}
    places = {"HOME": str(home), "NETRC": str(home / "netrc"), "TMPDIR": str(root)}
    # A new home has no font cache, which matplotlib would build for seconds.
    return {**kept, **folders, **places, "MPLCONFIGDIR": matplotlib.get_cachedir(), **more}


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers, like a firewall that swallows everything."""
    server = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        try:
            while True:
                connections.append(server.accept()[0])
        except OSError:
            return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for connection in connections:
        connection.close()


class Session:
    """:func:`~tests.runs.wandb_run.log_run` in a process with a home of its own below ``root``."""

    def __init__(self, root: Path, mode: str, *arguments: object, **environment: str) -> None:
        self.root, self.run_dir = root, root / "run"
        self.env = environment if "HOME" in environment else clean_environment(root, **environment)
        changes = dict.fromkeys(os.environ) | self.env
        self.files = [root / f"{mode}{len(arguments)}.{name}" for name in ("out", "err")]
        with self.files[0].open("wb") as out, self.files[1].open("wb") as err:
            pipes = {"log": out.fileno(), "errors": err.fileno()}
            self.process = Forked(self.run_dir, mode, *arguments, **pipes, env=changes, entry=log_run)

    def result(self) -> dict[str, Any]:
        """What it printed, which is nothing but our own lines."""
        code = self.process.wait()
        out, err = (file.read_text() for file in self.files)
        assert code == 0, err
        assert err == ""
        *before, last = out.splitlines()
        assert set(before) <= {"the run's own line"}, "the library prints nothing"
        return json.loads(last)


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Session]]:
    """All processes, started at once: most of their time they wait for the library's helper process."""
    root = tmp_path_factory.mktemp("wandb")
    wandb.Table(columns=["a"], data=[[1]])  # imports once for all processes what takes a second
    closed = {"WANDB_BASE_URL": f"http://127.0.0.1:{unused_port()}"}
    keyed = {"WANDB_API_KEY": KEY}
    netrc = clean_environment(root / "netrc", **closed)
    machine = closed["WANDB_BASE_URL"].removeprefix("http://")
    Path(netrc["NETRC"]).write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    (root / "unwritable" / "run").mkdir(parents=True)
    (root / "unwritable" / "run" / "wandb").write_text("a file where the library wants its folder")
    with silent_server() as silent:
        started = {
            name: Session(root / name, *arguments, **environment)
            for name, arguments, environment in (
                ("offline", ("offline", 5, 4, "--drawn"), {}),
                (
                    "streamed",
                    ("offline", 5, 3, "--drawn", "--link"),
                    {"WANDB_SWEEP_ID": "a", "WANDB_RUN_ID": "givenid1"},
                ),
                ("resumed", ("auto", 5, 2), {}),
                ("no key", ("online", 5, 1), {}),
                ("silent", ("auto", 1, 2), {**keyed, "WANDB_BASE_URL": silent}),
                ("no network", ("auto", 20, 1), {**keyed, **closed}),
                ("netrc", ("online", 5, 1), netrc),
                ("unwritable", ("offline", 5, 3), {}),
            )
        }
        yield started
        for session in started.values():
            if session.process.poll() is None:
                session.process.send_signal(signal.SIGKILL)
                session.process.wait()


def run_files(run_dir: Path) -> list[Path]:
    files = (path for path in run_dir.glob("wandb/*/run-*.wandb") if not path.parent.is_symlink())
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def test_an_offline_run_read_back(sessions: dict[str, Session]) -> None:
    said, run_dir = sessions["offline"].result(), sessions["offline"].run_dir
    assert said["warnings"] == []
    (file,) = run_files(run_dir)
    assert said["note"].startswith("W&B: offline; upload with `wandb sync ")
    assert file.parent.name in said["note"]

    records = wandb_file.read(file)
    header = next(r.run for r in records if r.HasField("run"))
    assert (header.project, header.run_group, header.job_type) == ("tests", "an experiment", "subspec")
    assert header.display_name == "tiny subspec-hqq4 gsm8k seed3"
    assert list(header.tags) == ["a"]
    assert header.run_id == json.loads((run_dir / "wandb_run.json").read_text())["id"]

    config = wandb_file.config(records)
    assert config["tree"] == CONFIG["tree"]
    assert config["seed"] == 3
    assert config["environment"] == {"versions": {"torch": "2"}}
    assert config["method"] == "subspec hqq4, beam 3x2"

    metrics = {m.name or m.glob_name: m for m in (r.metric for r in records if r.HasField("metric"))}
    for name in SERIES:
        assert metrics[name].step_metric == "sample_index", name
        assert metrics[name].summary.none, name

    turns = [row for row in wandb_file.history(records) if "tokens_per_s" in row]
    expected = [record(index) for index in range(4)]
    assert [row["sample_index"] for row in turns] == [0, 1, 2, 3]
    assert [row["_step"] for row in turns] == [0, 1, 2, 3]
    for name in ("tokens_per_s", "tau", "prefill_s", "decode_s", "peak_ram_gib"):
        assert [row[name] for row in turns] == pytest.approx([made[name] for made in expected]), name
    assert [row.get("correct") for row in turns] == [1, 0, None, 1]
    assert "link_gb_per_s" not in turns[0]
    assert "roofline_share" not in turns[0], "null figures are left out"
    last = summarise(expected)
    for name in ("tokens_per_s", "tau", "tokens_per_s_total"):
        assert turns[-1][f"total/{name}"] == pytest.approx(last["totals"][name])

    summary = wandb_file.summary(records)
    for name, value in flat_summary(last).items():
        assert summary[name] == pytest.approx(value), name
    assert summary["tokens_per_s"] == pytest.approx(last["totals"]["tokens_per_s"])
    assert summary["counts/turns"] == 4
    assert summary["per_turn/tau/median"] == pytest.approx(last["per_turn"]["tau"]["median"])
    assert summary["audit/exact"] == 40

    (place,) = [row["samples.path"] for row in wandb_file.history(records) if "samples.path" in row]
    table = json.loads((file.parent / "files" / place).read_text())
    assert table["columns"] == list(COLUMNS)
    assert [row[0] for row in table["data"]] == ["s0", "s1", "s2", "s3"]
    assert table["data"][1][COLUMNS.index("correct")] is False
    assert len(table["data"][0][COLUMNS.index("text")]) == 501
    plots = [path for path in file.parent.glob("files/media/table/*") if "accept_rate" in path.name]
    assert len(plots) == 1
    assert json.loads(plots[0].read_text())["data"][0][0] == 1
    assert summary["speedup/tokens_per_s"] == pytest.approx(1.0)
    assert summary["speedup/baseline"] == "itself"
    assert pictures(file) == {"acceptance", "time_split"}
    assert any(r.HasField("exit") for r in records), "closed properly"
    assert not any(r.HasField("output_raw") or r.HasField("output") for r in records), "no output is captured"


def pictures(file: Path) -> set[str]:
    """Names of a run's pictures (W&B adds the row and a digest), each of which is one."""
    files = list(file.parent.glob("files/media/images/plots/*.png"))
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in files)
    return {picture.stem.rsplit("_", 2)[0] for picture in files}


def test_a_streamed_run_of_a_sweeps_agent_has_its_name_and_a_roofline(sessions: dict[str, Session]) -> None:
    session = sessions["streamed"]
    assert session.result()["warnings"] == []
    (file,) = run_files(session.run_dir)
    assert file.name == "run-givenid1.wandb"
    assert json.loads((session.run_dir / "wandb_run.json").read_text())["id"] == "givenid1"
    assert pictures(file) == {"acceptance", "time_split", "roofline"}
    records = wandb_file.read(file)
    link = LinkInfo(50.0, 2_000_000_000)
    expected = [record(index, link=link) for index in range(3)]
    rows = [row for row in wandb_file.history(records) if "tau" in row]
    assert [row["roofline_share"] for row in rows] == pytest.approx([made["roofline_share"] for made in expected])
    total = summarise(expected)["totals"]
    summary = wandb_file.summary(records)
    for name in ("roofline_share", "roofline_tokens_per_s", "bytes_per_pass", "link_gb_per_s"):
        assert summary[name] == pytest.approx(total[name]), name


def test_offline_a_resumed_run_is_whole_in_its_newest_folder(sessions: dict[str, Session]) -> None:
    first, run_dir = sessions["resumed"].result(), sessions["resumed"].run_dir
    assert "offline (no W&B key found)" in first["note"]
    identity = json.loads((run_dir / "wandb_run.json").read_text())["id"]
    second = Session(sessions["resumed"].root, "auto", 5, 5, 2, **sessions["resumed"].env).result()
    assert f"run {identity} with the 2 earlier turn(s) again" in second["note"]
    files = run_files(run_dir)
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    rows = [row for row in wandb_file.history(wandb_file.read(files[-1])) if "tau" in row]
    assert [row["sample_index"] for row in rows] == [0, 1, 2, 3, 4], "the newest folder is complete"
    assert rows[-1]["total/tau"] == pytest.approx(summarise(record(n) for n in range(5))["totals"]["tau"])


def test_online_without_a_key_or_a_network_is_refused(sessions: dict[str, Session]) -> None:
    error = sessions["no key"].result()["error"]
    assert all(word in error for word in ("logger.mode=online", "wandb login", "logger.mode=offline"))
    error = sessions["netrc"].result()["error"]
    assert "cannot be reached" in error, "a key was found, so the network is what is missing"
    assert not (sessions["netrc"].run_dir / "wandb").exists()


def test_a_key_but_no_answer_goes_offline_in_bounded_time(sessions: dict[str, Session]) -> None:
    session = sessions["silent"]
    said = session.result()
    assert said["seconds"] < 40, "the library alone would try for minutes"
    assert "offline (W&B did not let the run start within 1 s" in said["note"]
    assert said["warnings"] == []
    (file,) = run_files(session.run_dir)
    assert file.parent.name.startswith("offline-"), "nothing is left of the attempt"
    assert len([row for row in wandb_file.history(wandb_file.read(file)) if "tau" in row]) == 2


def test_a_key_but_no_network_goes_offline_at_once(sessions: dict[str, Session]) -> None:
    said = sessions["no network"].result()
    assert "offline (127.0.0.1 cannot be reached)" in said["note"]
    assert said["seconds"] < 30


def test_a_folder_that_cannot_be_written_costs_one_warning(sessions: dict[str, Session]) -> None:
    said = sessions["unwritable"].result()
    assert said["error"] is None
    assert len(said["warnings"]) == 1


def hanging_finish(arguments: list[str]) -> None:
    Path(arguments[0]).mkdir()
    logger = make_logger(WandbConfig(name="wandb", mode=WandbMode.offline), print)
    logger.start(CONFIG, Path(arguments[0]), {})
    logger.log_turn(record(0), 0)
    logger.inner.deadlines_s = {"finish": 0.3}
    logger.inner._run.finish = lambda exit_code: time.sleep(100)
    logger.finish(None, 0)


def test_a_finish_that_hangs_holds_up_neither_the_run_nor_the_interpreter(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        pipes = {"log": out.fileno(), "errors": err.fileno()}
        env = dict.fromkeys(os.environ) | clean_environment(tmp_path)
        process = Forked(tmp_path / "run", **pipes, env=env, entry=hanging_finish)
    assert process.wait(timeout=60) == 0
    assert "did not come back within 0.3 s" in (tmp_path / "out").read_text()
    assert (tmp_path / "err").read_text() == ""
