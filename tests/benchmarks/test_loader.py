"""Sources other than the hub, the selection, and every way a file can be wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from subspec.benchmarks import TASKS, Sample, check_answer, load_benchmark
from subspec.benchmarks.loader import _distinct, _order
from subspec.config.schema import BenchmarkConfig, Source
from subspec.errors import ConfigError
from tests.benchmarks.rows import ROWS, jsonl

ROOT = Path(__file__).parents[2]
SHARED = ROOT / ".." / "shared" / "data"


def file_config(name: str, path: Path | str, **keys: object) -> BenchmarkConfig:
    return BenchmarkConfig(name=name, source=Source.file, path=str(path), **{"max_samples": None} | keys)


def load_text(tmp_path: Path, name: str, text: str | bytes, **keys: object):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_benchmark(file_config(name, path, **keys), seed=0)


# --------------------------------------------------------------------------------------------- converters


@pytest.mark.parametrize("name", TASKS)
def test_hub_rows_load_from_a_file(tmp_path: Path, name: str):
    benchmark = load_text(tmp_path, name, jsonl(ROWS[name]))
    assert benchmark.source is Source.file
    assert benchmark.source_detail == str(tmp_path / "rows.jsonl")
    assert benchmark.note is None
    assert benchmark.available == len(benchmark.samples) == len(ROWS[name])
    for sample in benchmark.samples:
        assert all(turn.strip() for turn in sample.turns)
        assert (sample.answer is not None) == (TASKS[name].checker is not None)


def by_id(tmp_path: Path, name: str) -> dict[str, Sample]:
    return {sample.id: sample for sample in load_text(tmp_path, name, jsonl(ROWS[name])).samples}


def test_mt_bench(tmp_path: Path):
    samples = by_id(tmp_path, "mt_bench")
    assert samples["mt_bench/901"].turns == ("Describe a quiet harbour.", "Make it rain.")
    renamed = [{"prompt_id": 901, "category": "writing", "prompt": ROWS["mt_bench"][0]["turns"]}]
    assert load_text(tmp_path, "mt_bench", jsonl(renamed)).samples == [samples["mt_bench/901"]]


def test_human_eval(tmp_path: Path):
    (turn,) = by_id(tmp_path, "human_eval")["HumanEval/900"].turns
    assert "```python\ndef double(x: int) -> int:" in turn


def test_gsm8k(tmp_path: Path):
    samples = by_id(tmp_path, "gsm8k")
    assert {id_: sample.answer for id_, sample in samples.items()} == {
        "gsm8k/0": "7",
        "gsm8k/1": "-10",
        "gsm8k/2": "2000",
    }
    assert '"Answer: N"' in samples["gsm8k/0"].turns[0]


def test_gsm8k_own_ids(tmp_path: Path):
    rows = [{"id": id_, "question": "How many?", "answer": "#### 1"} for id_ in ("gsm8k/17", 18, None)]
    samples = load_text(tmp_path, "gsm8k", jsonl(rows)).samples
    assert {sample.id for sample in samples} == {"gsm8k/17", "gsm8k/18", "gsm8k/2"}


def test_alpaca(tmp_path: Path):
    samples = by_id(tmp_path, "alpaca")
    assert samples["alpaca/0"].turns == ("Name a colour.",)
    assert samples["alpaca/1"].turns == ("Translate into French.\n\nInput:\ngood evening",)


def test_aime(tmp_path: Path):
    samples = by_id(tmp_path, "aime")
    assert (samples["aime/900"].answer, samples["aime/901"].answer) == ("25", "104")


def test_gpqa_order_depends_on_seed_and_id_only(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [ROWS["gpqa"][0] | {"Record ID": f"rec{i}"} for i in range(40)]
    path.write_text(jsonl(rows))
    first = load_benchmark(file_config("gpqa", path), seed=1)
    path.write_text(jsonl(rows[::-1]))
    again = load_benchmark(file_config("gpqa", path), seed=1)
    assert first.samples == again.samples
    other = load_benchmark(file_config("gpqa", path), seed=2)
    assert {s.id: s.turns for s in first.samples} != {s.id: s.turns for s in other.samples}
    assert {sample.answer for sample in first.samples} == set("ABCD")
    for sample in first.samples:
        assert f"\n{sample.answer}) the photon\n" in sample.turns[0]
        assert check_answer("gpqa", f"Answer: {sample.answer}", sample.answer) is True


def test_livecodebench(tmp_path: Path):
    samples = by_id(tmp_path, "livecodebench")
    assert "standard input" in samples["livecodebench/900_a"].turns[0]
    assert "class Solution:" in samples["livecodebench/901"].turns[0]
    assert "standard input" not in samples["livecodebench/901"].turns[0]


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
    benchmark = load_benchmark(file_config(name, SHARED / file), seed=0)
    assert benchmark.available == count == len({sample.id for sample in benchmark.samples})
    assert {len(sample.turns) for sample in benchmark.samples} == ({2} if name == "mt_bench" else {1})
    if name in ("gsm8k", "aime"):
        rows = [json.loads(line) for line in (SHARED / file).read_text().splitlines()]
        solutions = {
            f"{name}/{row.get('id', i)}": row.get("solution", row["answer"]) for i, row in enumerate(rows)
        }
        for sample in benchmark.samples:
            assert check_answer(name, solutions[sample.id], sample.answer) is True, sample.id


# --------------------------------------------------------------------------------------------- wrong input


GOOD = '{"question": "?", "answer": "#### 1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("\n \n", "holds no rows"),
        (GOOD + "{'question': 1}\n", "line 2 is not JSON"),
        (GOOD + "\n[1]\n", "line 3 is not a JSON object"),
        (
            GOOD + '{"answer": "#### 1", "prompt": "x"}',
            r"line 2: .*no field 'question'.*found: answer, prompt",
        ),
        ('{"question": null, "answer": "#### 1"}', "line 1: .*no field 'question'"),
        ('{"question": ["a"], "answer": "#### 1"}', r"'question' must be a non-empty string, not \['a'\]"),
        ('{"question": " ", "answer": "#### 1"}', "'question' must be a non-empty string"),
        ('{"question": "?", "answer": "one"}', "'answer' must end with a line '#### <integer>'"),
        ('{"question": "?", "answer": {}}', "'answer' must be a string or a whole number"),
        ("{}", "found: none"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("[" * 100_000, "line 1 is not JSON"),
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
        ("gpqa", {"Question": "?", "Correct Answer": "a"}, "'Incorrect Answer 1'"),
        ("math_500", {"problem": "?"}, "'answer'"),
        ("livecodebench", {"question_id": "x"}, "'question_content'"),
        ("human_eval", {"task_id": "x"}, "'prompt'"),
        ("cnn_dm", {"id": "x"}, "'article'"),
        ("alpaca", {"input": "x"}, "'instruction'"),
    ],
)
def test_broken_rows(tmp_path: Path, name: str, row: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path, name, jsonl([row]))


def test_broken_configurations(tmp_path: Path):
    def fails(message: str, **keys: object) -> None:
        with pytest.raises(ConfigError, match=message):
            load_benchmark(BenchmarkConfig(**{"name": "gsm8k"} | keys), seed=0)

    fails(r"benchmark\.name=gsm9k is unknown; choose one of: aime, .*math_500, mt_bench", name="gsm9k")
    fails(
        r"benchmark\.path=.*none\.jsonl does not exist", source=Source.file, path=str(tmp_path / "none.jsonl")
    )
    fails(r"is a folder", source=Source.file, path=str(tmp_path))
    fails(r"benchmark\.hub\.path is not set", source=Source.hub)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path):
    text = b"\xef\xbb\xbf" + GOOD.encode().replace(b"\n", b"\r\n") * 2
    assert load_text(tmp_path, "gsm8k", text).available == 2


def test_unreadable_file(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = tmp_path / "rows.jsonl"
    path.touch(mode=0o000)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_benchmark(file_config("gsm8k", path), seed=0)


# ----------------------------------------------------------------------------------------------- selection


def test_packaged_samples_say_what_they_are():
    config = BenchmarkConfig(name="gsm8k", source=Source.sample, max_samples=2)
    benchmark = load_benchmark(config, seed=0)
    assert (benchmark.source, benchmark.source_detail) == (Source.sample, "packaged sample prompts")
    assert benchmark.note is None
    assert len(benchmark.samples) == 2 < benchmark.available
    assert all("sample" in sample.id for sample in benchmark.samples)


IDS = st.lists(st.text(min_size=1, max_size=6), max_size=40)


@given(ids=IDS, seed=st.integers(-(2**63), 2**63))
def test_ids_become_distinct_and_first_ones_stay(ids: list[str], seed: int):
    distinct = _distinct(ids)
    assert len(set(distinct)) == len(ids)
    for id_ in set(ids):
        assert distinct[ids.index(id_)] == id_
    assert sorted(_order(distinct, seed)) == list(range(len(ids)))


@given(ids=IDS.map(_distinct), seed=st.integers(0, 1000), data=st.data())
def test_order_does_not_depend_on_the_order_of_rows_or_on_other_rows(
    ids: list[str], seed: int, data: st.DataObject
):
    ordered = [ids[i] for i in _order(ids, seed)]
    mixed = data.draw(st.permutations(ids))
    assert [mixed[i] for i in _order(mixed, seed)] == ordered
    kept = [id_ for id_ in ids if data.draw(st.booleans())]
    assert [kept[i] for i in _order(kept, seed)] == [id_ for id_ in ordered if id_ in kept]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 12))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fewer_samples_are_a_prefix_of_more(seed: int, count: int):
    def ids(max_samples: int | None) -> list[str]:
        config = BenchmarkConfig(name="math_500", source=Source.sample, max_samples=max_samples)
        return [sample.id for sample in load_benchmark(config, seed).samples]

    assert ids(count) == ids(None)[:count]


def test_seeds_differ():
    orders = {tuple(_order([f"gsm8k/{i}" for i in range(30)], seed)) for seed in range(50)}
    assert len(orders) == 50


def test_selection_is_the_same_in_every_process():
    script = (
        "from subspec.benchmarks import load_benchmark\n"
        "from subspec.config.schema import BenchmarkConfig, Source\n"
        "import sys\n"
        "b = load_benchmark(BenchmarkConfig(name='gpqa', source=Source.sample, max_samples=None), 5)\n"
        "print([(s.id, s.answer) for s in b.samples])\n"
        "assert not {'datasets', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_config_group_and_tasks_agree():
    """Every option of the config group fits the schema, and every task has an option."""
    options = {path.stem: OmegaConf.load(path) for path in (ROOT / "conf" / "benchmark").glob("*.yaml")}
    assert options.keys() == TASKS.keys()
    for name, option in options.items():
        option.pop("defaults")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), option))
        assert config.name == name
        assert load_benchmark(replace(config, source=Source.sample), seed=0).samples
        assert config.hub.path.count("/") == 1
        assert config.hub.split
