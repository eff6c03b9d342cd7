"""What the benchmark of ways to compute a level makes of its measurements."""

import importlib
from pathlib import Path

import pytest

from subspec.kernels.ops import Variant


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


def test_the_fastest_variant_is_named_as_it_was_timed(benchmark):
    variants = [Variant("int4_mma", 4, 3), Variant("int4_mma", 2, 1)]
    assert [benchmark.parse(str(variant)) for variant in variants] == variants
    times = {"out": {"int4_mma 2x4 ring 4": 5.0, "int4_mma 2x1 ring 4": 5.05, "int4_mma 4x1": 4.0}}
    assert benchmark.best_of(times, ringed=True) == {"out": Variant("int4_mma", 4, 1)}
    del times["out"]["int4_mma 4x1"]
    assert benchmark.best_of(times, ringed=True) == {"out": Variant("int4_mma", 2, 1, 4)}
