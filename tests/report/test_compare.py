"""Two runs, text by text."""

import json

import pytest

from subspec.errors import ConfigError
from subspec.report.compare import SHOWN, compare
from tests.helpers.records import record

from .runs import config_of, refusal, run, write_run

FACTS = {"dtype": "bfloat16", "device": "cuda"}


def text(index, ids, turn=0, **fields):
    """The record of a turn that emitted ``ids``."""
    return record(index, turn, token_ids=list(ids), new_tokens=len(ids), **fields)


def audit(ids, logits):
    return {"exact": 1, "near_tie": 0, "mismatch": 0, "max_gap": 0.0, "top_ids": ids, "top_logits": logits}


@pytest.fixture
def compared(tmp_path):
    """Compares two runs of the given records."""

    def write(a, b):
        return compare(write_run(tmp_path / "a", a, config_of("none")), write_run(tmp_path / "b", b))

    return write


def counts(found):
    return {name: len(keys) for name, keys in found.turns.items() if keys}


def keys_of(found):
    """Keys of the settings for which the runs are no twins."""
    return [line.partition(": ")[0] for line in found.not_twins]


# ------------------------------------------------------------------------------------------- differences


def test_identical_texts(compared):
    records = [text(0, [5, 6, 7]), text(1, []), text(1, [8, 9], turn=1)]
    found = compared(records, records[::-1])
    assert counts(found) == {"identical": 3}
    assert (found.a.tokens, found.b.tokens, found.equal_tokens) == (5, 5, 5)
    assert (found.differences, found.not_twins) == ([], [])
    assert (found.a.method, found.b.method) == ("plain decoding", "subspec hqq4, beam 3x2")


@pytest.mark.parametrize(
    ("a", "b", "index", "ids"),
    [
        ([5, 6, 7, 8, 9], [5, 6, 70, 8, 90, 91], 2, (7, 70)),
        ([5, 6], [5, 6, 7], 2, (None, 7)),
        ([5, 6, 7], [5, 6], 2, (7, None)),
        ([5], [6], 0, (5, 6)),
        ([], [6], 0, (None, 6)),
    ],
)
def test_the_first_difference(compared, a, b, index, ids):
    found = compared([text(0, [1, 2]), text(1, a)], [text(0, [1, 2]), text(1, b, finish_reason="length")])
    assert found.turns["identical"] == [("s0", 0)]
    (one,) = found.differences
    assert (one.sample_id, one.turn, one.index, (one.a, one.b)) == ("s1", 0, index, ids)
    assert (one.finish_a, one.finish_b, one.top) == ("eos", "length", None)
    assert (found.a.tokens, found.b.tokens, found.equal_tokens) == (2 + len(a), 2 + len(b), 2 + index)


def test_turns_with_another_prompt_are_counted_apart(compared):
    a = [text(0, [1, 2]), text(0, [3, 4], turn=1), text(1, [5, 6])]
    b = [text(0, [1, 9]), text(0, [3, 4], turn=1, prompt_sha256="f" * 64), text(1, [5, 6])]
    found = compared(a, b)
    assert counts(found) == {"identical": 1, "different": 1, "other_prompt": 1}
    assert found.turns["other_prompt"] == [("s0", 1)]
    assert found.a.tokens == 4, "a turn with another prompt is in no total"


def test_skipped_turns_and_turns_of_one_run_only(compared):
    skip = {"skipped": {"reason": "prompt_too_long"}}
    a = [text(0, [1]), record(1, **skip), record(2, **skip), text(3, [1]), text(4, [1]), record(7, **skip)]
    b = [text(0, [1]), record(1, **skip), text(2, [1]), record(3, **skip), text(5, [1]), text(6, [1])]
    found = compared(a, b)
    assert counts(found) == {"identical": 1, "skipped": 1, "skipped_once": 2, "only_a": 2, "only_b": 2}
    assert found.turns["only_b"] == [("s5", 0), ("s6", 0)]
    assert found.equal_tokens == 1


@pytest.mark.parametrize("side", ["a", "b"])
def test_logits_of_the_side_that_was_audited(compared, side):
    known = audit([[1, 4], [2, 9], [3, 4]], [[3.0, 1.0], [17.25, 17.125], [2.0, 1.0]])
    texts = {"a": [1, 2, 3], "b": [1, 9, 3]}
    found = compared(*([text(0, ids, audit=known if name == side else None)] for name, ids in texts.items()))
    top = found.differences[0].top
    assert (top.side, top.ids, top.logits, top.gap) == (side, (2, 9), (17.25, 17.125), 0.125)


def test_logits_at_the_end_of_the_shorter_text_come_from_the_longer_one(compared):
    short, long = audit([[1, 2]], [[2.0, 1.0]]), audit([[1, 2], [7, 8]], [[2.0, 1.0], [4.0, 3.5]])
    top = compared([text(0, [1], audit=short)], [text(0, [1, 7], audit=long)]).differences[0].top
    assert (top.side, top.ids, top.gap) == ("b", (7, 8), 0.5)


@pytest.mark.parametrize(
    "known",
    [
        None,
        {"exact": 1, "near_tie": 0, "mismatch": 0},
        audit([], []),
        audit([[1, 2]], [[None, None]]),
        audit([[1]], [[2.0, 1.0]]),
        audit(3, [[2.0, 1.0]]),
    ],
)
def test_logits_that_are_not_there(compared, known):
    (one,) = compared([text(0, [1], audit=known)], [text(0, [2], audit=known)]).differences
    assert one.top is None


# ------------------------------------------------------------------------------------ twins, and damage


@pytest.mark.parametrize(
    ("key", "config", "facts", "fields"),
    [
        ("target", {}, {}, {"target": "another"}),
        ("target.path", {"target": {"name": "t", "path": "elsewhere"}}, {}, {}),
        ("benchmark", {}, {}, {"benchmark": "aime"}),
        ("seed", {}, {}, {"seed": 9}),
        ("decoding.max_new_tokens", {"decoding": {"name": "greedy", "max_new_tokens": None}}, {}, {}),
        ("decoding.name", {"decoding": {"name": "sampling", "max_new_tokens": 8, "top_p": 0.9}}, {}, {}),
        ("dtype", {}, {"dtype": "float32"}, {}),
        ("device", {}, {"device": "cpu"}, {}),
        ("bitwise.on", {}, {"bitwise": {"on": False, "reason": "float16", "kernels": "own"}}, {}),
    ],
)
def test_runs_that_are_not_twins(tmp_path, key, config, facts, fields):
    base = {"target": {"name": "t", "path": "here"}, "decoding": {"name": "greedy", "max_new_tokens": 8}}
    bitwise = {"bitwise": {"on": True, "reason": "as asked", "kernels": "own"}}
    a = write_run(tmp_path / "a", [text(0, [1])], config_of("none", **base), facts=FACTS | bitwise)
    b = write_run(tmp_path / "b", [text(0, [1], **fields)], config_of(**(base | config)), facts=FACTS | bitwise | facts)
    assert keys_of(compare(a, b)) == [key]


def test_another_gpu_is_said(tmp_path):
    folders = [write_run(tmp_path / gpu, [text(0, [1], device="cuda")], facts=FACTS, gpu=gpu) for gpu in ("x", "y")]
    assert keys_of(compare(*folders)) == ["hardware"]


def test_what_a_folder_does_not_say_is_no_difference(tmp_path):
    a = write_run(tmp_path / "a", [text(0, [1])], facts=FACTS | {"bitwise": "nonsense"})
    b = write_run(tmp_path / "b", [text(0, [2], audit=None)], facts={"device": "cuda", "bitwise": {"on": False}})
    (b / "config.yaml").unlink()
    (b / "environment.json").unlink()
    found = compare(a, b)
    assert found.not_twins == []
    notes = " ".join(found.b.notes)
    assert all(word in notes for word in ("config.yaml", "environment.json", "bitwise"))


def test_damage_is_said_and_the_rest_compared(tmp_path):
    records = [text(0, [1]), text(1, [2]), text(2, [3])]
    a, b = (write_run(tmp_path / name, records) for name in "ab")
    broken = [json.dumps(records[0]), "no json", json.dumps(records[1] | {"token_ids": None}), '{"sample']
    (b / "records.jsonl").write_text("\n".join(broken))
    found = compare(a, b)
    assert counts(found) == {"identical": 1, "only_a": 2}
    assert found.a.notes == []
    notes = " ".join(found.b.notes)
    assert all(word in notes for word in ("damaged", "unfinished", "token_ids"))


def test_a_folder_of_runs_names_one(tmp_path):
    run = write_run(tmp_path / "sweep" / "0", [text(0, [1])])
    with pytest.raises(ConfigError, match=f"{run}"):
        compare(tmp_path / "sweep", run)
    inner = write_run(run / "later", [text(0, [2])])
    assert counts(compare(run, inner)) == {"different": 1}, "a run is itself, not what lies below it"


# ----------------------------------------------------------------------------------- the command line


def test_the_command_line_on_identical_runs(tmp_path, capsys):
    a, b = (write_run(tmp_path / name, [text(0, [1, 2]), text(1, [3])]) for name in "ab")
    code, out, err = run(capsys, "compare", a, b)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "2 of 2 turns identical (3 tokens)"
    assert str(a) in out
    assert "audit=true" not in out
    assert "not twins" not in out


def test_the_command_line_on_different_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    known = audit([[151643, 198]], [[17.25, 17.125]])
    long_id = "livecodebench/a-rather-long-name-of-a-problem"
    a = [text(0, [151643], sample_id=long_id, audit=known), text(1, [1, 2]), text(2, [4])]
    b = [text(0, [198], sample_id=long_id, finish_reason="length"), text(1, [1]), text(2, [4]), text(3, [1])]
    folders = [
        write_run(tmp_path / "a", a, config_of(seed=0)),
        write_run(tmp_path / "b", b, facts={"bitwise": {"on": False, "reason": "float16 has no kernels"}}),
    ]
    code, out, err = run(capsys, "compare", *folders, "--json", tmp_path / "new" / "found.json")
    assert (code, err) == (1, "")
    assert out.startswith("1 of 3 turns identical (")
    table = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, table)) <= 80
    for expected in (
        *("1 only in B", "151643", "198", "17.250", "17.125", "0.125", "eos", "length", "ended"),
        *("not recorded", "audit=true", "float16 has no kernels"),
    ):
        assert expected in out, expected
    written = json.loads((tmp_path / "new" / "found.json").read_text())
    assert written["counts"]["different"] == 2
    assert written["counts"]["only_b"] == 1
    assert written["turns"]["only_b"] == [["s3", 0]]
    first, second = written["differences"]
    assert (first["sample_id"], first["index"], first["a"], first["b"]) == (long_id, 0, 151643, 198)
    assert first["top"] == {"side": "a", "ids": [151643, 198], "logits": [17.25, 17.125], "gap": 0.125}
    assert (second["index"], second["a"], second["b"], second["top"]) == (1, 2, None, None)
    assert written["a"]["folder"] == str(folders[0])


def test_the_printed_list_is_capped_and_the_file_is_not(tmp_path, capsys):
    a, b = ([text(i, [token]) for i in range(SHOWN + 7)] for token in (1, 2))
    folders = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    code, out, _ = run(capsys, "compare", *folders, "--json", tmp_path / "found.json")
    assert code == 1
    assert f"s{SHOWN - 1} " in out
    assert f"s{SHOWN} " not in out
    assert "7 more" in out
    assert len(json.loads((tmp_path / "found.json").read_text())["differences"]) == SHOWN + 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["FOLDER_A", "compare --help"]),
        (["A"], ["FOLDER_B"]),
        (["A", "B", "C"], ["unrecognized"]),
        (["A", "B", "--out", "x"], ["--out"]),
        (["A", "missing"], ["missing", "no such folder"]),
        (["A", "."], ["not a run folder"]),
        (["A", "nothing"], ["not a run folder", "records.jsonl"]),
        (["A", "empty"], ["empty", "no records"]),
        (["A", "damaged"], ["damaged", "no records"]),
        (["A", "A/"], ["same run"]),
        (["A", "others"], ["in common", "1 only in A", "2 only in B"]),
        (["A", "prompts"], ["in common", "1 other prompt", "seed"]),
        (["A", "skipped"], ["in common", "1 skipped in one run"]),
        (["A", "B", "--json", "A/config.yaml/below"], ["config.yaml/below"]),
    ],
)
def test_failures_are_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name, records in {
        "A": [text(0, [1])],
        "B": [text(0, [1])],
        "empty": [],
        "damaged": [text(0, [1])],
        "others": [text(5, [1]), text(6, [1])],
        "prompts": [text(0, [1], prompt_sha256="0", seed=7)],
        "skipped": [record(0, skipped={"reason": "prompt_too_long"})],
    }.items():
        write_run(tmp_path / name, records)
    (tmp_path / "damaged" / "records.jsonl").write_bytes(b'{"sample_id": "s0", \xff')
    (tmp_path / "nothing").mkdir()
    code, line = refusal(capsys, "compare", *arguments)
    assert code == 2
    assert all(word in line for word in words), line


def test_a_folder_that_is_named_compare_has_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "compare", [text(0, [1])])
    write_run(tmp_path / "other", [text(0, [1])])
    for folders in (["./compare"], ["other", "compare"]):
        code, out, err = run(capsys, *folders, "--out", "out")
        assert (code, err) == (0, "")
        assert "report: " in out
    assert run(capsys, "compare", "compare", "other")[0] == 0
