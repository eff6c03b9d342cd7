import json

import pytest

import subspec.report
from subspec.errors import SubspecError
from subspec.report.run_data import State, collect, read_run

from .runs import turns, write_run


def test_a_whole_run(tmp_path):
    records = turns([10.0, 20.0])
    write_run(tmp_path / "run", records, facts={"substitute": {"bits_per_weight": 4.5}})
    (run,) = collect([tmp_path])
    assert run.state is State.finished
    assert run.name == f"{tmp_path.name}/run"
    assert run.overrides == ("draft=subspec", "quant.bits=4")
    assert list(run.records) == records
    assert run.facts["substitute"]["bits_per_weight"] == 4.5
    assert (run.damaged, run.notes) == (0, ())


def test_a_run_without_a_summary_or_with_an_older_one_is_unfinished(tmp_path):
    write_run(tmp_path / "none", turns([10.0]), finished=False)
    write_run(tmp_path / "older", turns([10.0]))
    write_run(tmp_path / "older", turns([10.0, 11.0]), finished=False)  # resumed, and killed again
    (tmp_path / "cut").mkdir()
    write_run(tmp_path / "cut", turns([10.0]), finished=False)
    (tmp_path / "cut" / "summary.json").write_text('{"counts": {"tur')
    runs = {run.folder.name: run for run in collect([tmp_path])}
    assert {run.state for run in runs.values()} == {State.unfinished}
    assert runs["cut"].notes == ("summary.json cannot be read (JSONDecodeError)",)


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    good = turns([10.0, 20.0, 30.0])
    folder = write_run(tmp_path / "run", good)
    lines = [json.dumps(record) for record in good]
    bad = ["not json", '{"no": "key"}', '{"sample_id": "x", "turn": 0}', "[1, 2]"]
    text = "\n".join([lines[0], bad[0], lines[1], lines[1], bad[1], bad[2], bad[3], lines[2], lines[0][:50]])
    (folder / "records.jsonl").write_bytes(text.encode() + b"\xff\xfe")
    run = read_run(folder)
    assert [record["sample_id"] for record in run.records] == ["s0", "s1", "s2"]
    assert run.damaged == 4, "three lines and the half-written last one"
    said = " ".join(run.notes)
    assert "1 repeated record(s) ignored" in said
    assert "1 record(s) lack fields" in said
    assert "4 damaged line(s)" in said


@pytest.mark.parametrize("field", ["drafted_by_depth", "iterations", "decode_s", "skipped", "audit"])
def test_a_field_of_a_wrong_type_costs_its_record_only(tmp_path, field):
    records = turns([10.0, 20.0])
    records[0][field] = "nonsense"
    run = read_run(write_run(tmp_path / "run", records, finished=False))
    assert [record["sample_id"] for record in run.records] == ["s1"]
    assert "1 record(s) lack fields" in " ".join(run.notes)


def test_missing_and_broken_files_are_said(tmp_path):
    folder = write_run(tmp_path / "run", turns([10.0], target="kept", benchmark="aime"), facts={})
    (folder / "config.yaml").write_text("a: [unclosed")
    (folder / "environment.json").unlink()
    (folder / "facts.json").write_text("[]")
    (folder / "overrides.yaml").write_text("{")
    run = read_run(folder)
    assert run.config["target"] == {"name": "kept"}
    assert run.config["benchmark"] == {"name": "aime"}
    assert run.overrides is None
    said = " ".join(run.notes)
    for expected in ("config.yaml cannot be read", "no environment.json", "facts.json cannot be read", "records alone"):
        assert expected in said


def test_a_run_that_has_generated_nothing(tmp_path):
    folder = write_run(tmp_path / "begun", [], finished=False)
    (folder / "records.jsonl").unlink()
    write_run(tmp_path / "skipped", [{**turns([1.0])[0], "skipped": {"reason": "prompt_too_long"}}])
    runs = {run.folder.name: run for run in collect([tmp_path])}
    assert {run.state for run in runs.values()} == {State.empty}


def test_what_is_no_run_and_what_is_found_twice(tmp_path):
    write_run(tmp_path / "a" / "0", turns([10.0]))
    write_run(tmp_path / "a" / "0" / "wandb" / "copy", turns([10.0]))
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned" / "plan.json").write_text("{}")
    runs = collect([tmp_path, tmp_path / "a", tmp_path / "a" / "0"])
    assert [run.folder for run in runs] == [tmp_path / "a" / "0"]


def test_nothing_to_report(tmp_path):
    with pytest.raises(SubspecError, match=r"no run below .*records\.jsonl"):
        collect([tmp_path])
    with pytest.raises(SubspecError, match="no such folder"):
        collect([tmp_path / "missing"])


def test_the_package_has_what_it_names():
    """Names are imported when they are asked for; no module of the package has one of them."""
    assert all(callable(getattr(subspec.report, name)) for name in subspec.report.__all__)
