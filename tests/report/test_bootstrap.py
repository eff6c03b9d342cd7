import numpy as np
import pytest

from subspec.report.bootstrap import speed_interval, speedup_interval


def samples(speeds, tokens=100.0):
    return {f"s{i}": (tokens, tokens / speed) for i, speed in enumerate(speeds)}


def test_two_samples_have_a_distribution_that_can_be_written_down():
    # Each draw is one of (a, a), (a, b), (b, a), (b, b), equally likely: 10, 20, 20, 30 tokens/s.
    two = {"a": (10.0, 1.0), "b": (30.0, 1.0)}
    found = speed_interval(two)
    assert (found.value, found.low, found.high, found.samples) == (20.0, 10.0, 30.0, 2)
    middle = speed_interval(two, level=0.4)
    assert (middle.low, middle.high) == (20.0, 20.0), "half of all draws are 20"


def test_many_samples_meet_normal_theory():
    speeds = np.random.default_rng(1).normal(50.0, 5.0, 400)
    one_second = {f"s{i}": (speed, 1.0) for i, speed in enumerate(speeds)}
    found = speed_interval(one_second)
    half = 1.96 * speeds.std(ddof=1) / np.sqrt(len(speeds))
    assert found.value == pytest.approx(speeds.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_the_estimate_is_all_tokens_over_all_seconds():
    assert speed_interval({"a": (10.0, 1.0), "b": (90.0, 3.0)}).value == 25.0


def test_pairs_know_their_ratio_better_than_either_speed():
    baseline = samples([1.0, 5.0, 20.0, 3.0, 9.0])
    twice = {key: (tokens, seconds / 2) for key, (tokens, seconds) in baseline.items()}
    paired = speedup_interval(twice, baseline)
    assert paired.paired
    assert (paired.value, paired.low, paired.high) == pytest.approx((2.0, 2.0, 2.0))
    others = {f"other {key}": value for key, value in twice.items()}
    unpaired = speedup_interval(others, baseline)
    assert not unpaired.paired
    assert unpaired.value == pytest.approx(2.0)
    assert unpaired.high - unpaired.low > 1.0


def test_only_samples_that_both_have_count_when_paired():
    ours = {"a": (10.0, 1.0), "b": (10.0, 1.0), "fast": (1000.0, 1.0)}
    baseline = {"a": (5.0, 1.0), "b": (5.0, 1.0), "slow": (1.0, 10.0)}
    found = speedup_interval(ours, baseline)
    assert (found.value, found.samples, found.paired) == (2.0, 2, True)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    table = samples(np.random.default_rng(0).uniform(1, 9, 30))
    assert speed_interval(table) == speed_interval(table)
    assert speed_interval(table) != speed_interval(table, seed=1)


def test_too_few_samples():
    assert speed_interval({}) is None
    assert speed_interval({"a": (0.0, 0.0)}) is None, "a text that ended at its prefill has no speed"
    one = speed_interval({"a": (10.0, 2.0)})
    assert (one.value, one.low, one.high, one.samples) == (5.0, None, None, 1)
    assert speedup_interval({"a": (10.0, 2.0)}, {}) is None
    single = speedup_interval({"a": (10.0, 2.0)}, {"a": (10.0, 4.0)})
    assert (single.value, single.low, single.paired) == (2.0, None, False)
