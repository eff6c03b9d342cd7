"""The packaged sample prompts are complete, correct and of the right size."""

import doctest
import json
import re
from collections import Counter
from fractions import Fraction
from importlib.resources import files

import pytest

from subspec.benchmarks import TASKS, check_answer, extract_answer, load_benchmark
from subspec.benchmarks.prompts import MT_BENCH
from subspec.config.schema import BenchmarkConfig, Source

FOLDER = files("subspec.benchmarks") / "samples"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", TASKS)
def test_every_benchmark_has_enough(name: str):
    config = BenchmarkConfig(name=name, source=Source.sample, max_samples=None)
    benchmark = load_benchmark(config, seed=0)
    assert len(benchmark.samples) == benchmark.available == len(rows(name)) >= 5
    assert len({sample.id for sample in benchmark.samples}) == benchmark.available
    assert len({sample.turns for sample in benchmark.samples}) == benchmark.available
    assert all("sample" in sample.id for sample in benchmark.samples)
    assert all((sample.answer is None) == (TASKS[name].checker is None) for sample in benchmark.samples)


def test_folder_holds_nothing_else():
    names = {entry.name for entry in FOLDER.iterdir()}
    assert names == {f"{name}.jsonl" for name in TASKS} | {"README.md"}
    assert "Apache-2.0" in (FOLDER / "README.md").read_text()


def test_categories():
    """Every category of the real data set (of Spec-Bench, every reported group, with two rows each)."""
    found = {name: Counter(row["category"] for row in rows(name)) for name in ("mt_bench", "speed_bench")}
    assert found["mt_bench"] == Counter(MT_BENCH)
    speed = {*MT_BENCH, "multilingual", "qa", "rag", "summarization"} - {"extraction"}
    assert found["speed_bench"].keys() == speed
    group = TASKS["spec_bench"].groups.get
    groups = Counter(group(row["category"], row["category"]) for row in rows("spec_bench"))
    names = ("translation", "summarization", "qa", "math_reasoning", "rag", "multi-turn")
    assert groups == dict.fromkeys(names, 2)


def test_turns():
    assert {len(row["turns"]) for row in rows("mt_bench")} == {2}
    for row in rows("spec_bench"):
        assert len(row["turns"]) == 1 + (row["category"] in MT_BENCH)
    speed = rows("speed_bench")
    assert {row["multiturn"] for row in speed} == {True, False}
    assert all(row["multiturn"] == (len(row["turns"]) > 1) for row in speed)


def test_spec_bench_references():
    sums = [row for row in rows("spec_bench") if row["category"] == "math_reasoning"]
    references = [int(row["reference"][0]) for row in sums]
    assert references == [(9 * 14 - 86) // 2, 704 // (35 - 3)]


@pytest.mark.parametrize("row", rows("human_eval"), ids=lambda row: row["entry_point"])
def test_human_eval_solutions_pass(row: dict):
    namespace: dict = {}
    exec(row["prompt"] + row["canonical_solution"] + "\n" + row["test"], namespace)
    function = namespace[row["entry_point"]]
    namespace["check"](function)
    examples = doctest.DocTestParser().get_doctest(function.__doc__, namespace, row["entry_point"], None, 0)
    results = doctest.DocTestRunner(verbose=False).run(examples)
    assert results.failed == 0
    assert results.attempted >= 2


@pytest.mark.parametrize("row", rows("gsm8k"), ids=lambda row: row["question"][:20])
def test_gsm8k_arithmetic(row: dict):
    steps = re.findall(r"<<([\d+*/. -]+)=([\d.]+)>>(\d+)", row["answer"])
    assert len(steps) >= 3
    for expression, value, shown in steps:
        assert Fraction(eval(expression, {"__builtins__": {}})) == Fraction(value) == Fraction(shown)
    final = row["answer"].splitlines()[-1]
    assert final.startswith("#### ")
    assert extract_answer("gsm8k", row["answer"]) in {shown for _, _, shown in steps}


@pytest.mark.parametrize("row", rows("math_500") + rows("aime"), ids=lambda row: row.get("unique_id", row.get("id")))
def test_boxed_result_is_the_answer(row: dict):
    name = "math_500" if "unique_id" in row else "aime"
    assert check_answer(name, row["solution"], row["answer"]) is True
    assert row.keys() >= ({"subject", "level"} if name == "math_500" else {"id"})


@pytest.mark.parametrize("row", rows("gpqa"), ids=lambda row: row["Record ID"])
def test_gpqa_has_four_options(row: dict):
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    assert len(set(options)) == 4
    assert len(row["Explanation"]) > 40


@pytest.mark.parametrize("row", rows("livecodebench"), ids=lambda row: row["question_id"])
def test_livecodebench_examples(row: dict):
    assert row["platform"]
    assert row["difficulty"] in {"easy", "medium", "hard"}
    cases = json.loads(row["public_test_cases"])
    assert len(cases) >= 2
    for case in cases:
        assert case["input"] in row["question_content"]
        assert case["output"].strip() in row["question_content"]
    for heading in ("Input", "Output", "Constraints", "Sample Input 1"):
        assert f"\n{heading}\n" in row["question_content"]


@pytest.mark.parametrize("row", rows("cnn_dm"), ids=lambda row: row["id"])
def test_articles_are_of_real_length(row: dict):
    assert 500 <= len(row["article"].split()) <= 800
    assert 3 <= len(row["highlights"].splitlines()) <= 4


def test_alpaca_covers_both_forms():
    assert {bool(row["input"]) for row in rows("alpaca")} == {True, False}
    assert all(row["output"] for row in rows("alpaca"))
