"""What the benchmark of ways to compute a level makes of its measurements."""

import importlib
from pathlib import Path

import pytest

from subspec.levels.model import Attention
from subspec.quant.level_linear import Variant


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("level_variants_benchmark")


def test_a_kernels_critical_time_is_what_it_adds_to_the_end_of_all_before(benchmark):
    spans = [(10.0, 14.0, "a"), (12.0, 15.0, "b"), (12.5, 13.0, "c"), (18.0, 20.0, "a")]
    table = benchmark.kernel_table(spans, replays=1)
    assert table["level_us"] == 10
    assert table["gaps_us"] == 3
    assert table["kernels"]["a"] == {"count": 2, "us": 6, "critical_us": 6}
    assert table["kernels"]["b"] == {"count": 1, "us": 3, "critical_us": 1}
    assert table["kernels"]["c"]["critical_us"] == 0
    critical = sum(kernel["critical_us"] for kernel in table["kernels"].values())
    assert critical + table["gaps_us"] == table["level_us"]
    assert benchmark.kernel_table(spans, replays=2)["kernels"]["a"] == {"count": 1, "us": 3, "critical_us": 3}


def test_as_good_as_the_fastest_with_fewer_slices_is_taken(benchmark):
    near, fastest = Variant("int4_mma", 4, 1), Variant("int4_mma", 4, 4)
    assert benchmark.best_of({"out": {fastest: 5.0, near: 5.05}}) == {"out": near}
    assert benchmark.best_of({"out": {fastest: 5.0, near: 5.2}}) == {"out": fastest}


def test_attention_is_not_chosen_for_short_prefixes_alone(benchmark):
    first, second, third = Attention(), Attention(8), Attention(32)
    times = {first: [10.0, 20.0], second: [4.0, 30.0], third: [6.0, 20.5]}
    assert benchmark.best_attention(times) == third
