import json
import os
import signal
import socket
import time
from pathlib import Path

import matplotlib.font_manager  # makes the font cache, if there is none
import pytest

from subspec.config.schema import WandbConfig, WandbMode
from subspec.errors import SubspecError
from subspec.records.metrics import LinkInfo, speedup, summarise
from subspec.report import run_figures  # noqa: F401  (likewise)
from subspec.runs.logger import make_logger
from subspec.runs.wandb_logger import COLUMNS, SERIES, flat_summary
from tests.helpers.cli import Forked
from tests.helpers.records import CONFIG, record
from tests.runs import wandb_file

wandb = pytest.importorskip("wandb")
KEY = "0123456789abcdef" * 3
LINK = LinkInfo(50.0, 2_000_000_000)
CLOSED = "127.0.0.1:9"
"""Nothing listens there."""


def log_run(arguments):
    """One logged run, as ``RUN_DIR MODE INIT_TIMEOUT TURNS [FINISHED] [--drawn] [--link]``.

    For a process of its own: the library keeps state for as long as a process lives. Prints one line, and one of JSON.
    """
    run_dir, mode, timeout, turns, *more = arguments
    done = int(more[0]) if more and more[0].isdigit() else 0
    shape = {"project": "tests", "group": "an experiment", "tags": ["a"], "init_timeout_s": float(timeout)}
    link = LINK if "--link" in more else None
    records = [record(index, link=link, text="long " * 500) for index in range(int(turns))]
    warnings, started, error = [], time.monotonic(), None
    logger = make_logger(WandbConfig(name="wandb", mode=WandbMode(mode), **shape), warnings.append)
    if "--drawn" not in more:
        logger.inner._pictures = lambda records: {}  # they take longer than the rest
    Path(run_dir).mkdir(exist_ok=True)
    try:
        logger.start(CONFIG, Path(run_dir), {"versions": {"torch": "2"}}, finished=records[:done])
        print("the run's own line", flush=True)
        for step, made in enumerate(records[done:], start=done):
            logger.log_turn(made, step)
        logger.log_table(records)
        summary = summarise(records)
        logger.finish({**summary, "speedup": speedup(summary, summary, "itself")}, 0)
    except SubspecError as refused:
        error = str(refused)
        logger.finish(None, refused.exit_code)
    said = {"note": logger.inner.note, "warnings": warnings, "error": error, "seconds": time.monotonic() - started}
    print(json.dumps(said), flush=True)


def clean_environment(root, **more):
    """No key, no proxy, and every folder that the library writes inside ``root``."""
    kept = {name: text for name, text in os.environ.items() if "WANDB_" not in name and "proxy" not in name.lower()}
    home = root / "home"
    home.mkdir(parents=True)
    folders = {f"WANDB_{name}_DIR": str(home / name.lower()) for name in ("CACHE", "DATA", "CONFIG")}
    places = {"HOME": str(home), "NETRC": str(home / "netrc"), "TMPDIR": str(root)}
    # A new home has no font cache, which matplotlib would build for seconds.
    return {**kept, **folders, **places, "MPLCONFIGDIR": matplotlib.get_cachedir(), **more}


class Session:
    """:func:`log_run` in a process with a home of its own below ``root``."""

    def __init__(self, root, mode, *arguments, **environment):
        self.root, self.run_dir = root, root / "run"
        self.env = environment if "HOME" in environment else clean_environment(root, **environment)
        changes = dict.fromkeys(os.environ) | self.env
        self.files = [root / f"{mode}{len(arguments)}.{name}" for name in ("out", "err")]
        with self.files[0].open("wb") as out, self.files[1].open("wb") as err:
            pipes = {"log": out.fileno(), "errors": err.fileno()}
            self.process = Forked(self.run_dir, mode, *arguments, **pipes, env=changes, entry=log_run)

    def result(self):
        """What it printed, which is nothing but our own lines."""
        code = self.process.wait()
        out, err = (file.read_text() for file in self.files)
        assert code == 0, err
        assert err == ""
        *before, last = out.splitlines()
        assert set(before) <= {"the run's own line"}, "the library prints nothing"
        return json.loads(last)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """All processes, started at once: most of their time they wait for the library's helper process."""
    root = tmp_path_factory.mktemp("wandb")
    wandb.Table(columns=["a"], data=[[1]])  # imports once for all processes what takes a second
    netrc = clean_environment(root / "netrc", WANDB_BASE_URL=f"http://{CLOSED}")
    Path(netrc["NETRC"]).write_text(f"machine {CLOSED}\n  login user\n  password {KEY}\n")
    (root / "unwritable" / "run").mkdir(parents=True)
    (root / "unwritable" / "run" / "wandb").write_text("a file where the library wants its folder")
    agent = {"WANDB_SWEEP_ID": "a", "WANDB_RUN_ID": "givenid1"}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        port = silent.getsockname()[1]
        started = {
            "offline": Session(root / "offline", "offline", 5, 4, "--drawn"),
            "streamed": Session(root / "streamed", "offline", 5, 3, "--drawn", "--link", **agent),
            "resumed": Session(root / "resumed", "auto", 5, 2),
            "no key": Session(root / "no key", "online", 5, 1),
            "silent": Session(
                root / "silent", "auto", 1, 2, WANDB_API_KEY=KEY, WANDB_BASE_URL=f"http://127.0.0.1:{port}"
            ),
            "no network": Session(
                root / "no network", "auto", 20, 1, WANDB_API_KEY=KEY, WANDB_BASE_URL=f"http://{CLOSED}"
            ),
            "netrc": Session(root / "netrc", "online", 5, 1, **netrc),
            "unwritable": Session(root / "unwritable", "offline", 5, 3),
        }
        yield started
        for session in started.values():
            if session.process.poll() is None:
                session.process.send_signal(signal.SIGKILL)
                session.process.wait()


def run_files(run_dir):
    files = (path for path in run_dir.glob("wandb/*/run-*.wandb") if not path.parent.is_symlink())
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def test_an_offline_run_read_back(sessions):
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
    added = {"environment": {"versions": {"torch": "2"}}, "method": "subspec hqq4, beam 3x2"}
    assert {name: config[name] for name in ("tree", "seed", *added)} == added | {"tree": CONFIG["tree"], "seed": 3}

    metrics = {m.name or m.glob_name: m for m in (r.metric for r in records if r.HasField("metric"))}
    assert {(metrics[name].step_metric, metrics[name].summary.none) for name in SERIES} == {("sample_index", True)}

    turns = [row for row in wandb_file.history(records) if "tokens_per_s" in row]
    expected = [record(index) for index in range(4)]
    assert [row["sample_index"] for row in turns] == [row["_step"] for row in turns] == [0, 1, 2, 3]
    for name in ("tokens_per_s", "tau", "prefill_s", "decode_s", "peak_ram_gib"):
        assert [row[name] for row in turns] == pytest.approx([made[name] for made in expected]), name
    assert [row.get("correct") for row in turns] == [1, 0, None, 1]
    assert "roofline_share" not in turns[0], "null figures are left out"
    last = summarise(expected)
    for name in ("tokens_per_s", "tau", "tokens_per_s_total"):
        assert turns[-1][f"total/{name}"] == pytest.approx(last["totals"][name])

    summary = wandb_file.summary(records)
    for name, value in flat_summary(last).items():
        assert summary[name] == pytest.approx(value), name
    assert {"tokens_per_s", "counts/turns", "per_turn/tau/median", "audit/exact"} <= set(flat_summary(last))

    (place,) = [row["samples.path"] for row in wandb_file.history(records) if "samples.path" in row]
    table = json.loads((file.parent / "files" / place).read_text())
    assert table["columns"] == list(COLUMNS)
    assert [row[0] for row in table["data"]] == ["s0", "s1", "s2", "s3"]
    assert table["data"][1][COLUMNS.index("correct")] is False
    assert len(table["data"][0][COLUMNS.index("text")]) == 501
    (plot,) = (path for path in file.parent.glob("files/media/table/*") if "accept_rate" in path.name)
    assert json.loads(plot.read_text())["data"][0][0] == 1
    assert (summary["speedup/tokens_per_s"], summary["speedup/baseline"]) == (pytest.approx(1.0), "itself")
    assert pictures(file) == {"acceptance", "time_split"}
    assert any(r.HasField("exit") for r in records), "closed properly"
    assert not any(r.HasField("output_raw") or r.HasField("output") for r in records), "no output is captured"


def pictures(file):
    """Names of a run's pictures (W&B adds the row and a digest), each of which is one."""
    files = list(file.parent.glob("files/media/images/plots/*.png"))
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in files)
    return {picture.stem.rsplit("_", 2)[0] for picture in files}


def test_a_streamed_run_of_a_sweeps_agent_has_its_name_and_a_roofline(sessions):
    session = sessions["streamed"]
    assert session.result()["warnings"] == []
    (file,) = run_files(session.run_dir)
    assert file.name == "run-givenid1.wandb"
    assert json.loads((session.run_dir / "wandb_run.json").read_text())["id"] == "givenid1"
    assert pictures(file) == {"acceptance", "time_split", "roofline"}
    records = wandb_file.read(file)
    expected = [record(index, link=LINK) for index in range(3)]
    rows = [row for row in wandb_file.history(records) if "tau" in row]
    assert [row["roofline_share"] for row in rows] == pytest.approx([made["roofline_share"] for made in expected])
    total = summarise(expected)["totals"]
    summary = wandb_file.summary(records)
    for name in ("roofline_share", "roofline_tokens_per_s", "bytes_per_pass", "link_gb_per_s"):
        assert summary[name] == pytest.approx(total[name]), name


def test_offline_a_resumed_run_is_whole_in_its_newest_folder(sessions):
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


def test_online_without_a_key_or_a_network_is_refused(sessions):
    error = sessions["no key"].result()["error"]
    assert all(word in error for word in ("logger.mode=online", "wandb login", "logger.mode=offline"))
    error = sessions["netrc"].result()["error"]
    assert "cannot be reached" in error, "a key was found, so the network is what is missing"
    assert not (sessions["netrc"].run_dir / "wandb").exists()


def test_a_key_but_no_answer_goes_offline_in_bounded_time(sessions):
    session = sessions["silent"]
    said = session.result()
    assert said["seconds"] < 40, "the library alone would try for minutes"
    assert "offline (W&B did not let the run start within 1 s" in said["note"]
    assert said["warnings"] == []
    (file,) = run_files(session.run_dir)
    assert file.parent.name.startswith("offline-"), "nothing is left of the attempt"
    assert len([row for row in wandb_file.history(wandb_file.read(file)) if "tau" in row]) == 2


def test_a_key_but_no_network_goes_offline_at_once(sessions):
    said = sessions["no network"].result()
    assert "offline (127.0.0.1 cannot be reached)" in said["note"]
    assert said["seconds"] < 30


def test_a_folder_that_cannot_be_written_costs_one_warning(sessions):
    said = sessions["unwritable"].result()
    assert said["error"] is None
    assert len(said["warnings"]) == 1


def hanging_finish(arguments):
    Path(arguments[0]).mkdir()
    logger = make_logger(WandbConfig(name="wandb", mode=WandbMode.offline), print)
    logger.start(CONFIG, Path(arguments[0]), {})
    logger.log_turn(record(0), 0)
    logger.inner.deadlines_s = {"finish": 0.3}
    logger.inner._run.finish = lambda exit_code: time.sleep(100)
    logger.finish(None, 0)


def test_a_finish_that_hangs_holds_up_neither_the_run_nor_the_interpreter(tmp_path):
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        pipes = {"log": out.fileno(), "errors": err.fileno()}
        env = dict.fromkeys(os.environ) | clean_environment(tmp_path)
        process = Forked(tmp_path / "run", **pipes, env=env, entry=hanging_finish)
    assert process.wait(timeout=60) == 0
    assert "did not come back within 0.3 s" in (tmp_path / "out").read_text()
    assert (tmp_path / "err").read_text() == ""
