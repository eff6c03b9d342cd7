"""Loading from the hub, through the real libraries, against a hub on localhost."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from subspec.benchmarks import TASKS, Benchmark, load_benchmark
from subspec.benchmarks.prompts import PLACEHOLDER
from subspec.benchmarks.rows import DataUnavailableError
from subspec.config.schema import BenchmarkConfig, HubData, Source
from subspec.errors import ConfigError, SubspecError
from subspec.utils import network
from tests.benchmarks.rows import ROWS, jsonl
from tests.helpers.fake_hub import FakeHub

ROOT = Path(__file__).parents[2]
CARD = """---
configs:
- config_name: main
  data_files:
  - split: test
    path: rows.jsonl
---
# A data set
"""


def load(path: str, name: str = "gsm8k", source: Source = Source.hub, seed: int = 0, **keys: object) -> Benchmark:
    """``keys``: of ``benchmark``, or of ``benchmark.hub``."""
    of_hub = {"path": path, "config": "main", "split": "test"}
    of_hub |= {key: keys.pop(key) for key in ("config", "split", "revision", "files") if key in keys}
    config = BenchmarkConfig(name=name, source=source, **{"max_samples": None, "hub": HubData(**of_hub)} | keys)
    return load_benchmark(config, seed)


def load_file(path: Path, name: str, seed: int = 0, **keys: object) -> Benchmark:
    config = BenchmarkConfig(name=name, source=Source.file, path=str(path), **{"max_samples": None} | keys)
    return load_benchmark(config, seed)


def publish(hub: FakeHub, path: str, rows: list) -> None:
    hub.repositories[path] = {"README.md": CARD, "rows.jsonl": jsonl(rows)}


@pytest.mark.parametrize("name", TASKS)
def test_every_benchmark_loads_from_the_hub_as_from_a_file(hub: FakeHub, name: str, tmp_path: Path):
    path = f"org/all-{name.replace('_', '-')}"
    publish(hub, path, [{k: str(v) if name == "aime" else v for k, v in row.items()} for row in ROWS[name]])
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS[name]))
    benchmark = load(path, name)
    assert (benchmark.source, benchmark.source_detail, benchmark.note) == (Source.hub, f"{path}@main/test", None)
    assert benchmark.samples == load_file(tmp_path / "rows.jsonl", name).samples
    assert benchmark.available == len(ROWS[name])


@pytest.mark.parametrize(
    ("keys", "count"),
    [({"max_samples": 4}, 4), ({"per_category": 2}, 6), ({"categories": ["qa", "rag"], "per_category": 3}, 6)],
)
def test_selection(hub: FakeHub, tmp_path: Path, keys: dict, count: int):
    """As from a file; rows that are not selected are not converted."""
    rows = [{"question_id": i, "category": one, "turns": [f"{i}?"]} for i, one in enumerate(["qa", "math", "rag"] * 9)]
    publish(hub, "org/selection", rows)
    (tmp_path / "rows.jsonl").write_text(jsonl(rows))
    loaded = load("org/selection", "mt_bench", seed=3, **keys)
    expected = load_file(tmp_path / "rows.jsonl", "mt_bench", seed=3, **keys)
    assert (loaded.samples, loaded.available) == (expected.samples, expected.available)
    assert len(loaded.samples) == count


def test_unusable_rows_are_replaced(hub: FakeHub):
    rows = [{"id": str(i), "article": "" if i < 15 else "It rained."} for i in range(20)]
    publish(hub, "org/odd", rows)
    benchmark = load("org/odd", "cnn_dm", max_samples=5)
    assert {sample.id for sample in benchmark.samples} == {f"cnn_dm/{i}" for i in range(15, 20)}
    assert "unusable rows left out: " in benchmark.note
    assert benchmark.skipped[0].startswith("row 0: field 'article'")


def test_placeholders_are_refused_and_auto_takes_samples(hub: FakeHub):
    publish(hub, "org/masked", [{"question_id": "a", "category": "qa", "turns": [PLACEHOLDER]}])
    with pytest.raises(DataUnavailableError, match=r"org/masked@main/test row 0 .*placeholder.*preparation script"):
        load("org/masked", "speed_bench")
    benchmark = load("org/masked", "speed_bench", Source.auto)
    assert benchmark.source is Source.sample
    assert "placeholder" in benchmark.note


def test_a_broken_schema_is_an_error_even_for_auto(hub: FakeHub):
    publish(hub, "org/schema", [{"prompt": "What?", "answer": "#### 1"}])
    with pytest.raises(ConfigError, match=r"org/schema@main/test row 0: .*'question'.*found: answer, prompt"):
        load("org/schema", source=Source.auto)


def test_auto_takes_the_hub_and_says_so(hub: FakeHub):
    publish(hub, "org/auto", ROWS["gsm8k"])
    benchmark = load("org/auto", source=Source.auto)
    assert benchmark.source is Source.hub
    assert benchmark.note == "benchmark.source=auto: the data set org/auto@main/test (the hub answers)"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "dev"}, r"benchmark\.hub\.split=dev is not a split of org/keys .*test"),
        ({"config": "other"}, r"benchmark\.hub\.config=other is not a configuration .*main"),
        ({"revision": "v9"}, r"benchmark\.hub\.revision=v9 does not exist"),
        ({"files": ["none.jsonl"]}, r"benchmark\.hub\.files=\['none\.jsonl'\]"),
        ({"path": "org/nothing"}, r"benchmark\.hub\.path=org/nothing is not on the hub"),
        ({"path": "not a/name/at all"}, r"benchmark\.hub\.path=not a/name/at all is neither"),
        ({"split": ""}, r"benchmark\.hub\.split is not set"),
        ({"path": "org/script", "config": None}, r"script data set.*benchmark\.hub\.files"),
    ],
)
@pytest.mark.parametrize("source", [Source.hub, Source.auto])
def test_wrong_coordinates_name_the_key(hub: FakeHub, source: Source, keys: dict, message: str):
    publish(hub, "org/keys", ROWS["gsm8k"])
    hub.repositories["org/script"] = {"README.md": "# x", "script.py": "pass", "rows.jsonl": "{}"}
    with pytest.raises(ConfigError, match=message) as caught:
        load(**{"path": "org/keys", "source": source} | keys)
    assert "\n" not in str(caught.value)


def test_files_of_a_script_data_set(hub: FakeHub):
    first, second = ROWS["livecodebench"]
    hub.repositories["org/code"] = {"code.py": "pass", "test4.jsonl": jsonl([first]), "test5.jsonl": jsonl([second])}
    benchmark = load("org/code", "livecodebench", config=None, files=["test4.jsonl", "test5.jsonl"])
    assert {sample.id for sample in benchmark.samples} == {"livecodebench/900_a", "livecodebench/901"}
    assert benchmark.source_detail == "org/code/test (test4.jsonl, test5.jsonl)"
    hub.repositories["org/code2"] = {"test5.jsonl": "<html>\n"}
    with pytest.raises(ConfigError, match=r"test5\.jsonl of benchmark\.hub\.path=org/code2 is an HTML"):
        load("org/code2", "livecodebench", config=None, files=["test5.jsonl"])


def test_gated(hub: FakeHub):
    hub.gated.add("org/gated")
    for keys in ({}, {"files": ["rows.jsonl"]}):
        with pytest.raises(DataUnavailableError, match=r"gated.*accept its terms.*HF_TOKEN.*source=file"):
            load("org/gated", **keys)
    benchmark = load("org/gated", source=Source.auto)
    assert (benchmark.source, benchmark.source_detail) == (Source.sample, "packaged sample prompts")
    assert "NOT the gsm8k data set" in benchmark.note
    assert "org/gated is gated" in benchmark.note


def test_broken_service_is_noticed_at_once_and_the_cache_is_used(hub: FakeHub):
    publish(hub, "org/cached", ROWS["gsm8k"])
    before = load("org/cached")
    hub.broken = True
    start = time.monotonic()
    after = load("org/cached")
    assert after.samples == before.samples
    assert after.source_detail == "org/cached@main/test, from the local cache"
    with pytest.raises(DataUnavailableError, match=r"HTTP 500.*org/uncached is not in the local cache"):
        load("org/uncached")
    assert load("org/uncached", source=Source.auto).source is Source.sample
    assert time.monotonic() - start < 5


def test_offline_variable_set_after_import(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    publish(hub, "org/offline", ROWS["gsm8k"])
    hub.repositories["org/offline-files"] = {"rows.jsonl": jsonl(ROWS["gsm8k"])}
    before = load("org/offline")
    load("org/offline-files", files=["rows.jsonl"])
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load("org/offline").samples == before.samples
    assert load("org/offline-files", files=["rows.jsonl"]).source_detail.endswith(", from the local cache")
    automatic = load("org/offline", source=Source.auto)
    assert automatic.source is Source.hub
    assert automatic.note.endswith("(local cache, because HF_HUB_OFFLINE is set)")
    with pytest.raises(ConfigError, match="split=dev"):
        load("org/offline", split="dev", source=Source.auto)
    with pytest.raises(DataUnavailableError, match="not in the local cache"):
        load("org/offline", config="other")
    assert load("org/never", source=Source.auto).source is Source.sample
    assert hub.requests == []


def test_data_fetched_with_hf_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """``hf download`` fills the hub library's cache, which ``datasets`` does not read offline."""
    from huggingface_hub import snapshot_download

    publish(hub, "org/downloaded", ROWS["gsm8k"])
    snapshot_download("org/downloaded", repo_type="dataset")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    benchmark = load("org/downloaded")
    assert benchmark.available == len(ROWS["gsm8k"])
    assert benchmark.source_detail == "org/downloaded@main/test, from the local cache"
    with pytest.raises(DataUnavailableError, match=r"org/downloaded@other/test is not in the local cache"):
        load("org/downloaded", config="other")


def test_nothing_is_printed_and_libraries_get_their_settings_back(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled

    def state() -> tuple:
        return constants.HF_HUB_OFFLINE, datasets.is_progress_bar_enabled(), are_progress_bars_disabled()

    before = state()
    publish(hub, "org/quiet", ROWS["gsm8k"])
    load("org/quiet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SubspecError):
        load("org/never")
    assert state() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_local_data_set_folder_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (folder := tmp_path / "folder").mkdir()
    if ending == "jsonl":
        (folder / "test.jsonl").write_text(jsonl(ROWS["math_500"]))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS["math_500"]), folder / "test.parquet")
    benchmark = load(str(folder), "math_500", config=None)
    assert [sample.id for sample in benchmark.samples] == ["math_500/test/prealgebra/900.json"]
    assert "cache" not in benchmark.source_detail


def test_local_folder_with_files(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(jsonl(ROWS["livecodebench"]))
    assert load(str(tmp_path), "livecodebench", files=["a.jsonl"]).available == 2
    with pytest.raises(ConfigError, match=r"b\.jsonl of benchmark\.hub\.path=.* does not exist"):
        load(str(tmp_path), "livecodebench", files=["b.jsonl"])


def test_unreachable_hub_is_decided_within_seconds(tmp_path: Path):
    """In a fresh process, as a user meets it: nothing listens at HF_ENDPOINT."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        script = """
import json, sys, time
from tests.benchmarks.test_hub import load
from subspec.config.schema import Source
from subspec.errors import SubspecError
assert "datasets" not in sys.modules
start = time.monotonic()
benchmark = load("org/name", source=Source.auto)
try:
    load("org/name")
except SubspecError as error:
    message = str(error)
print(json.dumps([time.monotonic() - start, benchmark.source.value, benchmark.note, message]))
"""
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seconds, source, note, message = json.loads(done.stdout.splitlines()[-1])
    assert seconds < 20  # the libraries alone would retry for minutes
    assert source == "sample"
    assert "\n" not in note + message
    assert all("127.0.0.1 cannot be reached" in text for text in (note, message))
    assert "source=file" in message


# ------------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 200 Connection established\r\n\r\n", None),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "the configured proxy refuses .* to hub.invalid .403 Forbidden."),
        (b"", "the configured proxy refuses a connection to hub.invalid .no answer."),
    ],
)
def test_probe_through_a_proxy(monkeypatch: pytest.MonkeyPatch, answer: bytes, problem: str | None):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{server.getsockname()[1]}")
        found = network.hub_problem("https://hub.invalid")
    assert found is problem or re.fullmatch(problem, found)


def test_probe_ignores_the_proxy_where_no_proxy_says_so(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert network.hub_problem(f"http://127.0.0.1:{server.getsockname()[1]}") is None


def test_probe_asks_once_per_process(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(network, "_try", lambda endpoint: calls.append(endpoint) or "no")
    assert network.hub_problem("https://hub.invalid") == network.hub_problem("https://hub.invalid") == "no"
    assert len(calls) == 1


def test_probe_does_not_wait_for_name_resolution(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network, "_try", lambda endpoint: time.sleep(20))
    monkeypatch.setattr(network, "TIMEOUT_S", -0.9)
    start = time.monotonic()
    assert "did not answer" in network.hub_problem("https://hub.invalid")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("endpoint", ["hub.invalid", "http://", "http://hub.invalid:port"])
def test_probe_of_a_wrong_endpoint(endpoint: str):
    assert "is not a web address" in network.hub_problem(endpoint)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_variables(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "0")
    assert network.offline_requested() is None
    monkeypatch.setenv(name, "true")
    assert network.hub_problem("https://hub.invalid") == f"{name} is set"
