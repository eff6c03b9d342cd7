import numpy as np
import pandas as pd
import pytest

from subspec.report import bootstrap
from subspec.report.bootstrap import speed_interval, speedup_interval


def samples(**by_name):
    """Tokens and seconds by sample."""
    return pd.DataFrame.from_dict(by_name, orient="index", columns=["tokens", "seconds"], dtype=float)


def of_speeds(speeds):
    return samples(**{f"s{i}": (100.0, 100.0 / speed) for i, speed in enumerate(speeds)})


def test_two_samples_have_a_distribution_that_can_be_written_down(monkeypatch):
    # Each draw is one of (a, a), (a, b), (b, a), (b, b), equally likely: 10, 20, 20, 30 tokens/s.
    two = samples(a=(10, 1), b=(30, 1))
    found = speed_interval(two)
    assert (found.value, found.low, found.high, found.samples) == (20.0, 10.0, 30.0, 2)
    monkeypatch.setattr(bootstrap, "LEVEL", 0.4)
    middle = speed_interval(two)
    assert (middle.low, middle.high) == (20.0, 20.0), "half of all draws are 20"


def test_many_samples_meet_normal_theory():
    speeds = np.random.default_rng(1).normal(50.0, 5.0, 400)
    found = speed_interval(pd.DataFrame({"tokens": speeds, "seconds": 1.0}))
    half = 1.96 * speeds.std(ddof=1) / np.sqrt(len(speeds))
    assert found.value == pytest.approx(speeds.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_pairs_know_their_ratio_better_than_either_speed():
    baseline = of_speeds([1.0, 5.0, 20.0, 3.0, 9.0])
    twice = baseline.assign(seconds=baseline.seconds / 2)
    paired = speedup_interval(twice, baseline)
    assert paired.paired
    assert (paired.value, paired.low, paired.high) == pytest.approx((2.0, 2.0, 2.0))
    unpaired = speedup_interval(twice.rename("other {}".format), baseline)
    assert not unpaired.paired
    assert unpaired.value == pytest.approx(2.0)
    assert unpaired.high - unpaired.low > 1.0


def test_only_samples_that_both_have_count_when_paired():
    ours = samples(a=(10, 1), b=(10, 1), fast=(1000, 1))
    found = speedup_interval(ours, samples(a=(5, 1), b=(5, 1), slow=(1, 10)))
    assert (found.value, found.samples, found.paired) == (2.0, 2, True)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another(monkeypatch):
    table = of_speeds(np.random.default_rng(0).uniform(1, 9, 30))
    found = speed_interval(table)
    assert speed_interval(table) == found
    monkeypatch.setattr(bootstrap, "SEED", 1)
    assert speed_interval(table) != found


def test_too_few_samples():
    assert speed_interval(samples()) is None
    assert speed_interval(samples(a=(0, 0))) is None, "a text that ended at its prefill has no speed"
    one = speed_interval(samples(a=(10, 2)))
    assert (one.value, one.low, one.high, one.samples) == (5.0, None, None, 1)
    assert speedup_interval(samples(a=(10, 2)), samples()) is None
    single = speedup_interval(samples(a=(10, 2)), samples(a=(10, 4)))
    assert (single.value, single.low, single.paired) == (2.0, None, False)
