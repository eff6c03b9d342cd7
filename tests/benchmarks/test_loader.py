"""Sources other than the hub, the selection, and every way a file can be wrong."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from subspec.benchmarks import TASKS, Benchmark, Sample, check_answer, load_benchmark
from subspec.benchmarks.loader import _distinct, _order
from subspec.benchmarks.prompts import PLACEHOLDER
from subspec.benchmarks.rows import DataUnavailableError
from subspec.config.schema import BenchmarkConfig, HubData, Source
from subspec.errors import ConfigError
from tests.benchmarks.rows import ROWS, jsonl

ROOT = Path(__file__).parents[2]
SHARED = ROOT / ".." / "shared" / "data"


def load(name: str, path: Path | None = None, seed: int = 0, **keys: object) -> Benchmark:
    """All rows of a file; the packaged samples without one."""
    source = Source.sample if path is None else Source.file
    keys = {"source": source, "path": path and str(path), "max_samples": None} | keys
    return load_benchmark(BenchmarkConfig(name=name, **keys), seed)


def load_text(
    folder: Path, name: str, text: str | bytes | list, file: str = "rows.jsonl", seed: int = 0, **keys: object
) -> Benchmark:
    content = jsonl(text) if isinstance(text, list) else text
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(name, folder / file, seed, **keys)


def ids(benchmark: Benchmark) -> list[str]:
    return [sample.id for sample in benchmark.samples]


# --------------------------------------------------------------------------------------------- converters


@pytest.mark.parametrize("name", TASKS)
def test_hub_rows_load_from_a_file(tmp_path: Path, name: str):
    benchmark = load_text(tmp_path, name, ROWS[name])
    assert (benchmark.source, benchmark.source_detail) == (Source.file, str(tmp_path / "rows.jsonl"))
    assert (benchmark.note, benchmark.skipped) == (None, [])
    assert benchmark.available == len(benchmark.samples) == len(ROWS[name])
    for sample in benchmark.samples:
        assert all(turn.strip() for turn in sample.turns)
        assert (sample.answer is not None) == (TASKS[name].checker is not None)


def by_id(tmp_path: Path, name: str) -> dict[str, Sample]:
    return {sample.id: sample for sample in load_text(tmp_path, name, ROWS[name]).samples}


@pytest.mark.parametrize(
    ("id_", "part"),
    [
        ("mt_bench/901", "Describe a quiet harbour."),
        ("spec_bench/1", "Translate: Guten Tag"),
        ("speed_bench/b2", "1 + 1?"),
        ("HumanEval/900", "```python\ndef double(x: int) -> int:"),
        ("gsm8k/0", '"Answer: N"'),
        ("alpaca/1", "Translate into French.\n\nInput:\ngood evening"),
        ("livecodebench/900_a", "standard input"),
        ("livecodebench/901", "class Solution:"),
    ],
)
def test_prompts(tmp_path: Path, id_: str, part: str):
    name = "human_eval" if id_.startswith("HumanEval") else id_.split("/")[0]
    first, *more = by_id(tmp_path, name)[id_].turns
    assert part in first
    assert bool(more) == (id_ in ("mt_bench/901", "speed_bench/b2"))
    assert ("standard input" in first) == (id_ == "livecodebench/900_a")


def test_answers_and_categories(tmp_path: Path):
    def values(name: str) -> dict:
        return {id_.split("/")[-1]: (one.answer, one.category) for id_, one in by_id(tmp_path, name).items()}

    assert values("gsm8k") == {"0": ("7", None), "1": ("-10", None), "2": ("2000", None)}
    assert values("aime") == {"900": ("25", None), "901": ("104", None)}
    assert values("math_500") == {"900.json": ("\\frac{1}{2}", "Prealgebra")}
    assert values("mt_bench") == {"901": (None, "writing"), "902": (None, "math")}
    assert values("spec_bench") == {"1": (None, "translation"), "2": (None, "writing"), "3": (None, "stem")}
    assert values("livecodebench") == {"900_a": (None, None), "901": (None, "hard")}
    assert {category for _, category in values("gpqa").values()} == {"Physics"}


def test_own_ids(tmp_path: Path):
    rows = [{"id": id_, "question": "?", "answer": "#### 1"} for id_ in ("gsm8k/17", 18, None, "\ud83d")]
    found = ids(load_text(tmp_path, "gsm8k", rows))
    assert set(found) == {f"gsm8k/{id_}" for id_ in (17, 18, 2, "?")}


def test_columns_of_other_names(tmp_path: Path):
    first = by_id(tmp_path, "mt_bench")["mt_bench/901"]
    renamed = [{"prompt_id": 901, "category": "writing", "prompt": list(first.turns)}]
    assert load_text(tmp_path, "mt_bench", renamed).samples == [first]
    said = [("user", first.turns[0]), ("assistant", "It is quiet."), ("user", first.turns[1])]
    messages = [{"role": role, "content": content} for role, content in said]
    resolved = {"question_id": 901, "category": "writing", "messages": messages, "turns": None}
    for name in ("mt_bench", "spec_bench", "speed_bench"):
        (sample,) = load_text(tmp_path, name, [resolved]).samples
        assert (sample.turns, sample.category) == (first.turns, "writing")


def test_gpqa_order_depends_on_seed_and_id_only(tmp_path: Path):
    rows = [ROWS["gpqa"][0] | {"Record ID": f"rec{i}"} for i in range(40)]
    first = load_text(tmp_path, "gpqa", rows, seed=1)
    assert first.samples == load_text(tmp_path, "gpqa", rows[::-1], seed=1).samples
    other = load_text(tmp_path, "gpqa", rows, seed=2)
    assert {s.id: s.turns for s in first.samples} != {s.id: s.turns for s in other.samples}
    assert {sample.answer for sample in first.samples} == set("ABCD")
    for sample in first.samples:
        assert f"\n{sample.answer}) the photon\n" in sample.turns[0]
        assert check_answer("gpqa", f"Answer: {sample.answer}", sample.answer) is True


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("gsm8k", "gsm8k_test.jsonl", 1319),
        ("human_eval", "humaneval_test.jsonl", 164),
        ("mt_bench", "mt_bench.jsonl", 80),
        ("aime", "aime24_test.jsonl", 30),
    ],
)
def test_real_rows(name: str, file: str, count: int):
    if not (SHARED / file).exists():
        pytest.skip("the real rows are not on this machine")
    benchmark = load(name, SHARED / file)
    assert benchmark.available == count == len(set(ids(benchmark)))
    assert {len(sample.turns) for sample in benchmark.samples} == ({2} if name == "mt_bench" else {1})
    if name in ("gsm8k", "aime"):
        rows = map(json.loads, (SHARED / file).read_text().splitlines())
        named = {f"{name}/{row.get('id', i)}": row for i, row in enumerate(rows)}
        solutions = {id_: row.get("solution", row["answer"]) for id_, row in named.items()}
        for sample in benchmark.samples:
            assert check_answer(name, solutions[sample.id], sample.answer) is True, sample.id


# -------------------------------------------------------------------------------------------------- formats

GOOD = '{"question": "?", "answer": "#### 1"}\n'


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # the same bytes, and so the same name of the test, in every process


CSV = 'question,answer,id\n"How many, and\nwhy?","1 + 1 = 2\n#### 2",17\n'


def parquet(folder: Path) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist([json.loads(GOOD)]), folder / "made")
    return (folder / "made").read_bytes()


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("rows.jsonl", b"\xef\xbb\xbf" + GOOD.encode().replace(b"\n", b"\r\n") * 2, {"gsm8k/0", "gsm8k/1"}),
        ("rows.jsonl.gz", gzipped(GOOD.encode()), {"gsm8k/0"}),
        ("rows", gzipped(GOOD.encode()), {"gsm8k/0"}),
        ("rows.json", json.dumps([json.loads(GOOD)] * 2, indent=1).encode(), {"gsm8k/0", "gsm8k/1"}),
        ("rows.jsonl", b"\n [" + GOOD.encode() + b"]", {"gsm8k/0"}),
        ("rows.csv", CSV.encode(), {"gsm8k/17"}),
        ("rows.CSV", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(), {"gsm8k/17"}),
        ("rows.csv.gz", gzipped(CSV.encode()), {"gsm8k/17"}),
        ("rows.tsv", b"question\tanswer\tid\nWhy, how?\t#### 2\t17\n", {"gsm8k/17"}),
        ("rows.csv", b"question,answer\n" + b"w" * 200_000 + b",#### 1\n", {"gsm8k/0"}),
        ("rows.parquet", parquet, {"gsm8k/0"}),
    ],
)  # fmt: skip
def test_formats(tmp_path: Path, file: str, content: object, expected: set[str]):
    content = content(tmp_path) if callable(content) else content
    assert set(ids(load_text(tmp_path, "gsm8k", content, file))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("\n \n", "holds no rows"),
        ("[]", "holds no rows"),
        (GOOD + "{'question': 1}\n", "line 2 is not JSON"),
        (GOOD + "\n[1]\n", "line 3 is not a JSON object"),
        ("[1]", "row 1 is not a JSON object"),
        ("[" * 100_000, "is not JSON"),
        (b"\xe9", "not UTF-8"),
        (b"\xff\xfe{}", "UTF-16 text: save it as UTF-8"),
        (b"PK\x03\x04", "zip archive"),
        (b"\x28\xb5\x2f\xfd", "zstd: unpack it"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer: fetch"),
        ("<!DOCTYPE html>", "HTML .* download the raw file"),
        (b"PAR1 and no more", "damaged .*readable: JSON Lines"),
        (gzipped(GOOD.encode() * 99)[:-20], "damaged .*readable: JSON Lines"),
        (gzipped(GOOD.encode()) + b"x", "cannot be read"),
        # No row can be used: the first one's message.
        ('{"answer": "#### 1", "prompt": "x"}', r"line 1: .*no field 'question'.*found: answer, prompt"),
        ('{"question": null, "answer": "#### 1"}', "line 1: .*no field 'question'"),
        ('{"question": ["a"], "answer": "#### 1"}', r"'question' must be a non-empty string, not \['a'\]"),
        ('{"question": " ", "answer": "#### 1"}', "'question' must be a non-empty string"),
        ('{"question": "a \\ud83d b", "answer": "#### 1"}', "surrogate"),
        ('{"question": "?", "answer": "one"}', "'answer' must end with a line '#### <integer>'"),
        ('{"question": "?", "answer": {}}', "'answer' must be a string or a number"),
        ("{}", "found: none"),
    ],
)
def test_broken_files(tmp_path: Path, text: str | bytes, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_text(tmp_path, "gsm8k", text)
    assert "benchmark.path=" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("aime", {"id": 1, "problem": "?", "answer": 1000}, "from 0 to 999"),
        ("aime", {"id": 1, "problem": "?", "answer": True}, "'answer' must be"),
        ("mt_bench", {"question_id": 1, "turns": "one"}, "list of non-empty strings"),
        ("mt_bench", {"question_id": 1, "turns": []}, "list of non-empty strings"),
        ("mt_bench", {"question_id": 1, "turns": ["a", ""]}, "list of non-empty strings"),
        ("mt_bench", {"question_id": 1}, "'turns' or 'prompt'"),
        ("speed_bench", {"messages": [{"role": "system", "content": "x"}]}, "'messages' must be a list of messages"),
        ("speed_bench", {"messages": ["x"]}, "'messages' must be a list of messages"),
        ("gpqa", {"Question": "?", "Correct Answer": "a"}, "'Incorrect Answer 1'"),
        ("math_500", {"problem": "?"}, "'answer'"),
        ("math_500", {"problem": "?", "answer": float("nan")}, "'answer'"),
        ("livecodebench", {"question_id": "x"}, "'question_content'"),
        ("human_eval", {"task_id": "x"}, "'prompt'"),
        ("cnn_dm", {"id": "x", "article": ""}, "'article'"),
        ("alpaca", {"input": "x"}, "'instruction'"),
    ],
)  # fmt: skip
def test_unusable_rows_are_left_out_and_named(tmp_path: Path, name: str, row: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path, name, [row])
    good = [json.loads(json.dumps(one)) for one in ROWS[name]]
    benchmark = load_text(tmp_path, name, [*good, row])
    assert benchmark.available == len(benchmark.samples) == len(good)
    (skipped,) = benchmark.skipped
    assert skipped.startswith(f"line {len(good) + 1}: ")
    assert benchmark.note == f"unusable rows left out: 1 ({skipped})"


def test_numbers_as_answers(tmp_path: Path):
    rows = [{"problem": "?", "answer": answer} for answer in (2.5, 3.0, 4)]
    assert {s.answer for s in load_text(tmp_path, "math_500", rows).samples} == {"2.5", "3", "4"}
    degrees = [{"problem": "?", "answer": answer} for answer in ("336^\\circ", "033")]
    assert {s.answer for s in load_text(tmp_path, "aime", degrees).samples} == {"336", "33"}


def test_many_unusable_rows(tmp_path: Path):
    rows = [*json.loads(f"[{GOOD}]"), *[{"question": "?", "answer": "so\n#### 2.5"}] * 5]
    benchmark = load_text(tmp_path, "gsm8k", rows, max_samples=1)
    assert ids(benchmark) == ["gsm8k/0"]
    assert [text[:7] for text in benchmark.skipped] == [f"line {i}:" for i in range(2, 7)]
    assert benchmark.note.startswith("unusable rows left out: 5 (line 2: ")
    assert benchmark.note.endswith(" and 2 more)")


def test_placeholders_are_refused(tmp_path: Path):
    rows = [*ROWS["speed_bench"], {"category": "qa", "turns": [f"{PLACEHOLDER} FROM THE SOURCE"]}]
    message = r"line 3 .*placeholder.*; .*preparation script.*benchmark\.path"
    with pytest.raises(DataUnavailableError, match=message) as caught:
        load_text(tmp_path, "speed_bench", rows)
    assert "\n" not in str(caught.value)
    # Categories that are whole can be run.
    chosen = load_text(tmp_path, "speed_bench", rows, categories=["coding"])
    assert ids(chosen) == ["speed_bench/a1"]


@pytest.mark.parametrize("key", ["path", "split"])
def test_spec_bench_is_not_on_the_hub(key: str):
    hub = HubData(**{"path": "org/name", "split": "test"} | {key: ""})
    with pytest.raises(DataUnavailableError, match=r"https://\S+question\.jsonl; download .*benchmark\.path"):
        load("spec_bench", source=Source.hub, hub=hub)
    benchmark = load("spec_bench", source=Source.auto, hub=hub)
    assert benchmark.source is Source.sample
    assert "NOT the spec_bench data set" in benchmark.note
    assert "question.jsonl" in benchmark.note


def test_broken_configurations(tmp_path: Path):
    for message, name, keys in (
        (r"benchmark\.name=gsm9k is unknown; choose one of: aime, .*math_500, mt_bench", "gsm9k", {}),
        (r"benchmark\.path=.*none\.jsonl does not exist", "gsm8k", {"path": tmp_path / "none.jsonl"}),
        (r"is a folder", "gsm8k", {"path": tmp_path}),
        (r"benchmark\.hub\.path is not set", "gsm8k", {"source": Source.hub}),
    ):
        with pytest.raises(ConfigError, match=message):
            load(name, **keys)


def test_unreadable_file(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = tmp_path / "rows.jsonl"
    path.touch(mode=0o000)
    with pytest.raises(ConfigError, match="cannot be read"):
        load("gsm8k", path)


# ----------------------------------------------------------------------------------------------- selection


def test_packaged_samples_say_what_they_are():
    benchmark = load("gsm8k", max_samples=2)
    assert (benchmark.source, benchmark.source_detail) == (Source.sample, "packaged sample prompts")
    assert benchmark.note is None
    assert len(benchmark.samples) == 2 < benchmark.available
    assert all("sample" in sample.id for sample in benchmark.samples)


CATEGORIES = ["writing"] * 9 + ["math"] * 5 + ["stem"] * 2 + ["qa"] * 3


def choose(folder: Path, name: str = "spec_bench", seed: int = 0, **keys: object) -> list[Sample]:
    rows = [{"question_id": i, "category": one, "turns": [f"{i}?"]} for i, one in enumerate(CATEGORIES)]
    unusable = {"question_id": 99, "category": "qa", "turns": None}
    return load_text(folder, name, [*rows, unusable], seed=seed, **keys).samples


def counts(samples: list[Sample]) -> Counter:
    return Counter(sample.category for sample in samples)


def test_categories(tmp_path: Path):
    assert counts(choose(tmp_path, categories=["math", "qa"])) == {"math": 5, "qa": 3}
    assert counts(choose(tmp_path, categories=["multi-turn"])) == {"writing": 9, "math": 5, "stem": 2}
    everything = choose(tmp_path)
    assert choose(tmp_path, categories=["math"]) == [one for one in everything if one.category == "math"]
    with pytest.raises(ConfigError, match=r"categories: .*'maths'; .* math, multi-turn, qa, stem, writing"):
        choose(tmp_path, categories=["math", "maths"])
    with pytest.raises(ConfigError, match="has: math, qa, stem, writing"):
        choose(tmp_path, "mt_bench", categories=["multi-turn"])
    for key, value in (("categories", ["x"]), ("per_category", 1)):
        with pytest.raises(ConfigError, match=rf"benchmark\.{key}: .*benchmark=gsm8k have no categories"):
            load_text(tmp_path, "gsm8k", GOOD, **{key: value})


def test_per_category(tmp_path: Path):
    assert counts(choose(tmp_path, per_category=4)) == {"writing": 4, "math": 4, "stem": 2, "qa": 3}
    assert counts(choose(tmp_path, per_category=4, categories=["math", "stem"])) == {"math": 4, "stem": 2}
    assert counts(choose(tmp_path, per_category=4, max_samples=8)) == dict.fromkeys(set(CATEGORIES), 2)
    larger = choose(tmp_path, per_category=9)
    for number in range(1, 9):  # fewer are a prefix of more
        fewer = choose(tmp_path, per_category=number)
        assert fewer == larger[: len(fewer)]
    assert choose(tmp_path, per_category=2, seed=1) != choose(tmp_path, per_category=2)


IDS = st.lists(st.text(min_size=1, max_size=6), max_size=40)


@given(ids=IDS, seed=st.integers(-(2**63), 2**63))
def test_ids_become_distinct_and_first_ones_stay(ids: list[str], seed: int):
    distinct = _distinct(ids)
    assert len(set(distinct)) == len(ids)
    for id_ in set(ids):
        assert distinct[ids.index(id_)] == id_
    assert sorted(_order(distinct, seed)) == list(range(len(ids)))


@given(ids=IDS.map(_distinct), seed=st.integers(0, 1000), data=st.data())
def test_order_does_not_depend_on_the_order_of_rows_or_on_other_rows(ids: list[str], seed: int, data: st.DataObject):
    ordered = [ids[i] for i in _order(ids, seed)]
    mixed = data.draw(st.permutations(ids))
    assert [mixed[i] for i in _order(mixed, seed)] == ordered
    kept = [id_ for id_ in ids if data.draw(st.booleans())]
    assert [kept[i] for i in _order(kept, seed)] == [id_ for id_ in ordered if id_ in kept]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 12))
def test_fewer_samples_are_a_prefix_of_more(seed: int, count: int):
    assert ids(load("math_500", seed=seed, max_samples=count)) == ids(load("math_500", seed=seed))[:count]


def test_seeds_differ():
    orders = {tuple(_order([f"gsm8k/{i}" for i in range(30)], seed)) for seed in range(50)}
    assert len(orders) == 50


def test_selection_is_the_same_in_every_process():
    script = """
import sys
from subspec.benchmarks import load_benchmark
from subspec.config.schema import BenchmarkConfig, Source
found = load_benchmark(BenchmarkConfig(name="gpqa", source=Source.sample, max_samples=None), 5)
print([(one.id, one.answer) for one in found.samples])
assert not {"datasets", "torch", "transformers", "huggingface_hub"} & set(sys.modules)
"""
    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert eval(done.stdout) == [(one.id, one.answer) for one in load("gpqa", seed=5).samples]


def test_config_group_and_tasks_agree():
    options = {path.stem: OmegaConf.load(path) for path in (ROOT / "conf" / "benchmark").glob("*.yaml")}
    assert options.keys() == TASKS.keys()
    for name, option in options.items():
        on_hub = TASKS[name].published is None
        assert (option.name, option.hub.path.count("/"), bool(option.hub.split)) == (name, int(on_hub), on_hub)
