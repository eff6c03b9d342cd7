import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subspec.records.metrics import LinkInfo, summarise
from subspec.runs.wandb_logger import COLUMNS, SERIES, flat_summary
from tests.helpers.records import CONFIG, record

from . import wandb_file

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 3


@pytest.fixture
def clean_environment(tmp_path: Path) -> dict[str, str]:
    """No key, no proxy, and every folder that the library writes inside ``tmp_path``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("WANDB_") and "proxy" not in name.lower()
    }
    home = tmp_path / "home"
    home.mkdir()
    folders = {f"WANDB_{name}_DIR": str(home / name.lower()) for name in ("CACHE", "DATA", "CONFIG")}
    return {**kept, **folders, "HOME": str(home), "NETRC": str(home / "netrc"), "TMPDIR": str(tmp_path)}


@pytest.fixture
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


def run(environment: dict[str, str], run_dir: Path, mode: str, *arguments: object) -> dict[str, Any]:
    """Run ``wandb_run`` and return what it printed, which is nothing but our own line, and how long it took."""
    command = [sys.executable, "-m", "tests.runs.wandb_run", str(run_dir), mode, *map(str, arguments)]
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=None,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *before, last = done.stdout.splitlines()
    assert set(before) <= {"the run's own line"}, "the library prints nothing"
    return {**json.loads(last), "wall": time.monotonic() - started}


def run_files(run_dir: Path) -> list[Path]:
    files = (path for path in run_dir.glob("wandb/*/run-*.wandb") if not path.parent.is_symlink())
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def test_an_offline_run_read_back(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    run_dir = tmp_path / "run"
    said = run(clean_environment, run_dir, "offline", 5, 4)
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


def test_a_streamed_run_has_its_roofline(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    said = run(clean_environment, tmp_path / "run", "offline", 5, 3, "--link")
    assert said["warnings"] == []
    (file,) = run_files(tmp_path / "run")
    assert pictures(file) == {"acceptance", "time_split", "roofline"}
    records = wandb_file.read(file)
    link = LinkInfo(50.0, 2_000_000_000)
    expected = [record(index, link=link) for index in range(3)]
    rows = [row for row in wandb_file.history(records) if "tau" in row]
    assert [row["roofline_share"] for row in rows] == pytest.approx(
        [made["roofline_share"] for made in expected]
    )
    total = summarise(expected)["totals"]
    summary = wandb_file.summary(records)
    for name in ("roofline_share", "roofline_tokens_per_s", "bytes_per_pass", "link_gb_per_s"):
        assert summary[name] == pytest.approx(total[name]), name


def test_a_sweeps_agent_names_the_run(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    environment = {**clean_environment, "WANDB_SWEEP_ID": "asweep", "WANDB_RUN_ID": "givenid1"}
    said = run(environment, tmp_path / "run", "offline", 5, 1)
    assert said["warnings"] == []
    (file,) = run_files(tmp_path / "run")
    assert file.name == "run-givenid1.wandb"


def test_auto_without_a_key_is_offline_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    run_dir = tmp_path / "run"
    first = run(clean_environment, run_dir, "auto", 5, 2)
    assert "offline (no W&B key found)" in first["note"]
    identity = json.loads((run_dir / "wandb_run.json").read_text())["id"]
    second = run(clean_environment, run_dir, "auto", 5, 5, 2)
    assert f"run {identity} with the 2 earlier turn(s) again" in second["note"]
    files = run_files(run_dir)
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    rows = [row for row in wandb_file.history(wandb_file.read(files[-1])) if "tau" in row]
    assert [row["sample_index"] for row in rows] == [0, 1, 2, 3, 4], "the newest folder is complete"
    assert rows[-1]["total/tau"] == pytest.approx(summarise(record(n) for n in range(5))["totals"]["tau"])


def test_online_without_a_key_is_refused(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    said = run(clean_environment, tmp_path / "run", "online", 5, 1)
    assert "logger.mode=online" in said["error"]
    assert "wandb login" in said["error"]
    assert "logger.mode=offline" in said["error"]
    assert said["wall"] < 15


def test_a_key_but_no_answer_goes_offline_in_bounded_time(
    tmp_path: Path, clean_environment: dict[str, str], silent_server: str
) -> None:
    run_dir = tmp_path / "run"
    environment = {**clean_environment, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": silent_server}
    said = run(environment, run_dir, "auto", 1, 2)
    assert said["wall"] < 20, "the end of the process included"
    assert "offline (W&B did not let the run start within 1 s" in said["note"]
    assert said["warnings"] == []
    (file,) = run_files(run_dir)
    assert file.parent.name.startswith("offline-"), "nothing is left of the attempt"
    assert len([row for row in wandb_file.history(wandb_file.read(file)) if "tau" in row]) == 2


def test_a_key_but_no_network_goes_offline_at_once(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    environment = {**clean_environment, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": closed}
    said = run(environment, tmp_path / "run", "auto", 20, 1)
    assert "offline (127.0.0.1 cannot be reached)" in said["note"]
    assert said["wall"] < 15
    refused = run(environment, tmp_path / "other", "online", 20, 1)
    assert "cannot be reached" in refused["error"]
    assert not (tmp_path / "other" / "wandb").exists()


def test_a_key_in_netrc_is_found(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    Path(clean_environment["NETRC"]).write_text(f"machine 127.0.0.1:{port}\n  login user\n  password {KEY}\n")
    environment = {**clean_environment, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}
    said = run(environment, tmp_path / "run", "online", 5, 1)
    assert "cannot be reached" in said["error"], "a key was found, so the network is what is missing"


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file where the library wants its folder")
    said = run(clean_environment, tmp_path / "run", "offline", 5, 3)
    assert said["error"] is None
    assert len(said["warnings"]) == 1


def test_a_finish_that_hangs_holds_up_neither_the_run_nor_the_interpreter(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from subspec.config.schema import WandbConfig, WandbMode\n"
        "from subspec.runs.logger import make_logger\n"
        "from tests.tracking.factory import CONFIG, record\n"
        "logger = make_logger(WandbConfig(name='wandb', mode=WandbMode.offline), print)\n"
        "logger.start(CONFIG, Path(sys.argv[1]), {})\n"
        "logger.log_turn(record(0), 0)\n"
        "logger.inner.deadlines_s = {'finish': 0.3}\n"
        "logger.inner._run.finish = lambda exit_code: time.sleep(100)\n"
        "logger.finish(None, 0)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert "did not come back within 0.3 s" in done.stdout
    assert done.stderr == ""
