import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from subspec.errors import ConfigError, SubspecError
from subspec.records.metrics import summarise
from subspec.records.run_folder import DAMAGED, RECORDS, RunFolder, read_records
from subspec.records.same_run import check_chosen, config_differences
from subspec.utils.files import json_line, plain
from tests.helpers.cli import Forked
from tests.helpers.records import CONFIG, record


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch, request):
    """Hundreds of files are opened here; waiting for the disk each time proves nothing about a killed process."""
    if "real_fsync" not in request.fixturenames:
        monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def real_fsync():
    """Keep the real one."""


def open_folder(path, resume=False, **changes):
    return RunFolder.open(path, resume=resume, config={**CONFIG, **changes})


def small(index):
    return {"sample_id": f"s{index}", "turn": 0, "sample_index": index, "text": f"«{index}» €"}


def filled(path, count=3):
    with open_folder(path) as folder:
        for index in range(count):
            assert folder.append(record(index))
        return folder.records()


# ------------------------------------------------------------------------------------------------ writing


def test_a_fresh_folder_describes_its_run(tmp_path):
    environment = {"versions": {"torch": "2"}, "hardware": {}, "git": None}
    with RunFolder.open(tmp_path / "a" / "b", resume=False, config=CONFIG, environment=environment) as folder:
        assert (folder.resumed, folder.notes, len(folder)) == (False, [], 0)
        assert folder.append(record(0))
        folder.write_summary(summarise(folder.records()))
    made = tmp_path / "a" / "b"
    assert yaml.safe_load((made / "config.yaml").read_text()) == CONFIG
    assert json.loads((made / "environment.json").read_text()) == environment
    summary = json.loads((made / "summary.json").read_text())
    assert summary["counts"]["turns"] == 1
    assert summary["config"] == CONFIG
    assert summary["environment"] == environment


def test_a_record_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    writes, synced, write = [], [], os.write
    with open_folder(tmp_path) as folder:
        monkeypatch.setattr(os, "write", lambda handle, data: writes.append(bytes(data)) or write(handle, data))
        monkeypatch.setattr(os, "fsync", synced.append)
        folder.append(record(0))
        assert (tmp_path / RECORDS).read_bytes() == writes[0]
        assert len(writes) == 1, "one write, so that a kill tears one line at most"
        assert len(synced) == 1


def test_what_is_read_back_equals_what_was_written_once(tmp_path):
    filled(tmp_path)
    with open_folder(tmp_path, resume=True) as folder:
        folder.append({**small(3), "a": float("nan"), "b": {"c": [-float("inf")]}})
        written = folder.records()
    before = (tmp_path / RECORDS).read_bytes()
    with open_folder(tmp_path, resume=True) as folder:
        assert folder.records() == written
        assert (written[3]["a"], written[3]["b"]) == (None, {"c": [None]})
        assert (folder.finished("s1", 0), folder.finished("s1", 1)) == (written[1], None)
        assert folder.resumed
        assert len(folder.notes) == 1
        assert not folder.append(record(1, text="another"))
        assert folder.records()[1]["text"] == "an answer"
    assert (tmp_path / RECORDS).read_bytes() == before
    assert read_records(tmp_path) == (written, [])


def test_a_record_without_its_key_is_a_bug(tmp_path):
    with open_folder(tmp_path) as folder, pytest.raises(ValueError, match="sample_id"):
        folder.append({"turn": 0})


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
def test_any_plain_value_survives_one_ascii_line(value):
    line = json_line(value)
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert line.isascii()
    assert json.loads(line, parse_constant=pytest.fail) == plain(value)


def test_scalars_of_numpy_and_torch_are_taken():
    import numpy
    import torch

    made = plain({"a": numpy.float32(0.5), "b": torch.tensor([1, 2]), "c": numpy.int64(3), "d": numpy.float32("nan")})
    assert made == {"a": 0.5, "b": [1, 2], "c": 3, "d": None}
    with pytest.raises(TypeError, match="object"):
        plain(object())


# ------------------------------------------------------------------------------------------------ resuming


def test_a_folder_without_records_is_free(tmp_path):
    with open_folder(tmp_path, resume=True) as folder:
        assert not folder.resumed
        assert "from the beginning" in folder.notes[0]
    with open_folder(tmp_path, seed=4) as folder:
        assert folder.notes == []
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 4


def test_records_are_continued_by_their_own_configuration_only(tmp_path):
    filled(tmp_path)
    before = (tmp_path / RECORDS).read_bytes()
    with pytest.raises(ConfigError, match=r"resume=true.*run_dir="):
        open_folder(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_folder(tmp_path, resume=True, seed=9, tree={"name": "chain", "depth": 3}, audit=False)
    message = str(caught.value)
    for part in ("seed: 3 -> 9", 'tree.name: "beam" -> "chain"', "tree.width: 2 -> (absent)", "audit: true -> false"):
        assert part in message
    assert "tree.depth" not in message
    assert "\n" not in message
    assert (tmp_path / RECORDS).read_bytes() == before
    changing_no_record = {"logger": {"name": "wandb"}, "run_dir": "elsewhere", "experiment": "x"}
    with open_folder(tmp_path, resume=True, **changing_no_record) as folder:  # the lock was let go
        assert len(folder) == 3
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml is missing"):
        open_folder(tmp_path, resume=True)


@given(st.dictionaries(st.text(), st.floats() | st.text() | st.booleans() | st.none() | st.integers(), max_size=5))
def test_a_configuration_equals_itself_after_the_disk(tmp_path, values):
    """Stop strings may hold anything, line separators too."""
    for leftover in tmp_path.iterdir():
        leftover.unlink()
    with open_folder(tmp_path, decoding=values) as folder:
        folder.append(small(0))
    with open_folder(tmp_path, resume=True, decoding=values) as folder:
        assert len(folder) == 1


@pytest.mark.parametrize(
    ("before", "now", "differences"),
    [
        ({"a": 1}, {"a": True}, ["a: 1 -> true"]),
        ({"device": "auto"}, {"device": "cpu"}, []),
        ({"device": "cuda"}, {"device": "cpu"}, ['device: "cuda" -> "cpu"']),
        ({"target": {"dtype": "auto"}}, {"target": {"dtype": "float32"}}, ['target.dtype: "auto" -> "float32"']),
        # A key that is newer than the folder differs only if it is used.
        ({"a": {}}, {"a": {"new": None}}, []),
        ({"a": {}}, {"a": {"new": 2}}, ["a.new: (absent) -> 2"]),
        ({"decoding": {}}, {"decoding": {"texts": 1}}, []),
        ({"decoding": {}}, {"decoding": {"texts": 2}}, ["decoding.texts: (absent) -> 2"]),
    ],
)
def test_what_is_another_configuration(before, now, differences):
    assert config_differences(before, now) == differences


def test_a_folder_of_before_counted_its_budget_in_the_allocator(tmp_path):
    """Its configuration does not say so; ``auto`` is another configuration than the number that it came to."""
    budget = {"name": "stream", "vram_gib": 8.0}
    with open_folder(tmp_path, offload=budget) as folder:
        folder.append(record(0))
    with open_folder(tmp_path, resume=True, offload={**budget, "vram_counts": "allocator"}):
        pass
    for change in ({"vram_counts": "device"}, {"vram_gib": "auto", "vram_counts": "allocator"}):
        with pytest.raises(ConfigError, match=rf"offload\.{next(iter(change))}: .* -> ") as refusal:
            open_folder(tmp_path, resume=True, offload={**budget, **change})
        assert "\n" not in str(refusal.value)


def test_records_of_another_source_or_device_take_no_others(tmp_path):
    auto = {**CONFIG, "device": "auto", "benchmark": {**CONFIG["benchmark"], "source": "auto"}}
    here = {"source": "file", "device": "cpu"}

    def again(chosen, **changes):
        check = lambda records: check_chosen(tmp_path, records, chosen)  # noqa: E731
        return RunFolder.open(tmp_path, resume=True, config={**auto, **changes}, check=check)

    with RunFolder.open(tmp_path, resume=False, config=auto) as folder:
        folder.append(record(0))
    torn = (tmp_path / RECORDS).read_bytes() + b'{"sample_id'
    (tmp_path / RECORDS).write_bytes(torn)
    with pytest.raises(ConfigError, match=r"device comes to cuda now, .* are of cpu: set device=cpu, or choose"):
        again({**here, "device": "cuda"}, device="cuda")
    assert (tmp_path / RECORDS).read_bytes() == torn, "nothing is touched, not even to repair it"
    assert not (tmp_path / DAMAGED).exists()
    for changes in ({}, {"device": "cpu"}, {"benchmark": {**auto["benchmark"], "source": "file"}}, {}):
        with again(here, **changes) as folder:
            assert len(folder) == 1
    with again(here) as folder:  # as a run of an earlier version could
        folder.append(record(1, source="hub"))
    with pytest.raises(ConfigError, match=r"are of file and hub: choose another folder with run_dir="):
        again(here)


def test_a_changed_machine_is_noted_and_recorded(tmp_path):
    first = {"versions": {"torch": "2.13"}, "hardware": {"cpu": "x"}, "git": None, "timestamp": "1"}
    second = {"versions": {"torch": "2.12"}, "hardware": {"cpu": "x"}, "git": None, "timestamp": "2"}
    with RunFolder.open(tmp_path, resume=False, config=CONFIG, environment=first) as folder:
        folder.append(record(0))
    with RunFolder.open(tmp_path, resume=True, config=CONFIG, environment=second) as folder:
        assert any('versions.torch: "2.13" -> "2.12"' in note for note in folder.notes)
    assert json.loads((tmp_path / "environment.json").read_text()) == {**first, "resumed": [second]}


# ------------------------------------------------------------------------------------------------ damage


def test_a_file_cut_at_any_byte_loses_the_torn_line_only(tmp_path):
    folder = open_folder(tmp_path)
    for index in range(4):
        folder.append(small(index))
    folder.close()
    whole = (tmp_path / RECORDS).read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) + 1):
        (tmp_path / RECORDS).write_bytes(whole[:cut])
        (tmp_path / DAMAGED).unlink(missing_ok=True)
        # A record is whole once its last brace is there; only its newline may be missing.
        kept = sum(len(b"".join(lines[: n + 1])) - 1 <= cut for n in range(4))
        torn = whole[len(b"".join(lines[:kept])) : cut]
        with open_folder(tmp_path, resume=True) as folder:
            assert folder.records() == [small(index) for index in range(kept)], cut
            assert any("half-written last line" in note for note in folder.notes) == bool(torn), cut
            for index in range(4):
                assert folder.append(small(index)) == (index >= kept)
        assert (tmp_path / RECORDS).read_bytes() == whole, cut
        damaged = (tmp_path / DAMAGED).read_bytes() if torn else b""
        assert damaged == (torn + b"\n" if torn else b""), cut


@given(st.data())
def test_any_damage_inside_costs_its_own_line_only(tmp_path, data):
    lines = [json_line(small(index)) for index in range(4)]
    victim = data.draw(st.integers(0, 3))
    junk = data.draw(st.binary(min_size=1, max_size=30).filter(lambda b: b.strip() and b"\n" not in b))
    place = data.draw(st.integers(0, len(lines[victim]) - 2))
    broken = lines[victim][:place] + junk  # the rest of the line is gone
    try:
        json.loads(broken)
        return  # not damaged after all
    except ValueError:
        pass
    for leftover in tmp_path.iterdir():
        leftover.unlink()
    open_folder(tmp_path).close()
    (tmp_path / RECORDS).write_bytes(b"".join([*lines[:victim], broken + b"\n", *lines[victim + 1 :]]))
    survivors = [small(index) for index in range(4) if index != victim]
    assert read_records(tmp_path)[0] == survivors
    with open_folder(tmp_path, resume=True) as folder:
        assert folder.records() == survivors
        assert sum(f"line {victim + 1} " in note for note in folder.notes) == 1
        assert folder.append(small(victim))
    assert (tmp_path / DAMAGED).read_bytes() == broken + b"\n"
    with open_folder(tmp_path, resume=True) as folder:
        assert len(folder) == 4
        assert len(folder.notes) == 1, "repaired once, then quiet"


def test_repeated_records_count_once(tmp_path):
    filled(tmp_path, 2)
    with (tmp_path / RECORDS).open("ab") as file:
        file.write(json_line(record(0, text="again")))
    with open_folder(tmp_path, resume=True) as folder:
        assert [made["text"] for made in folder.records()] == ["an answer", "an answer"]
        assert any("repeated" in note for note in folder.notes)


def test_reading_changes_nothing_and_names_what_is_missing(tmp_path):
    filled(tmp_path, 2)
    torn = (tmp_path / RECORDS).read_bytes()[:-5]
    (tmp_path / RECORDS).write_bytes(torn)
    records, notes = read_records(tmp_path)
    assert len(records) == 1
    assert "ignored" in notes[0]
    assert (tmp_path / RECORDS).read_bytes() == torn
    with pytest.raises(SubspecError, match=r"records\.jsonl"):
        read_records(tmp_path / "nowhere")


def append_until_killed(arguments):
    path, count, resume = arguments
    with open_folder(Path(path), resume == "True") as folder:
        print("open")
        for index in range(int(count)):
            if folder.finished(f"s{index}", 0) is None:
                folder.append(record(index, text="x" * 3000))
                print(index)
        print("end")


def appender(path, count, resume):
    """A process that appends records until it is killed, and its output."""
    output, end = os.pipe()
    process = Forked(path, count, resume, log=end, entry=append_until_killed)
    os.close(end)
    return process, os.fdopen(output)


def test_kill_9_loses_nothing_that_was_announced(tmp_path, real_fsync):
    announced: set[str] = set()
    for attempt, patience in enumerate((3, 9, 17)):
        process, output = appender(tmp_path, 2000, resume=attempt > 0)
        with output:
            for line in output:  # what it announced between our decision and its death counts as well
                if line.strip().isdigit():
                    announced.add(f"s{line.strip()}")
                    patience -= 1
                if not patience:
                    process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        records, _ = read_records(tmp_path)
        assert announced <= {made["sample_id"] for made in records}
    count = len(announced) + 5
    process, output = appender(tmp_path, count, resume=True)
    with output:
        assert output.read().endswith("end\n")
    assert process.wait() == 0
    raw = [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()]
    assert [made["sample_id"] for made in raw] == [f"s{index}" for index in range(count)]


def test_a_killed_owner_does_not_block_but_a_living_one_does(tmp_path, real_fsync):
    process, output = appender(tmp_path, 10**6, resume=False)
    with output:
        assert output.readline() == "open\n"
        with pytest.raises(SubspecError, match="in use by another process"):
            open_folder(tmp_path, resume=True)
        process.send_signal(signal.SIGKILL)
    process.wait()
    with open_folder(tmp_path, resume=True), pytest.raises(SubspecError, match="in use"):
        open_folder(tmp_path, resume=True)
    open_folder(tmp_path, resume=True).close()
