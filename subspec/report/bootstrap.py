"""Percentile bootstrap (Efron, 1979) of speeds and speed-ups, over samples.

A run's speed is all its tokens over all its seconds; what varies from one draw to the next is which samples are in.
Two runs of the same prompts are resampled together ("paired"): a prompt that is easy for one is mostly easy for the
other, so their ratio is known better than either speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""Draws: enough for two digits of a 95 % interval."""

LEVEL = 0.95

SEED = 0

Speed = tuple[float, float]
"""Tokens and seconds of a sample."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval.

    Attributes:
        value: the estimate from all samples.
        low, high: ends of the interval; None with fewer than two samples.
        samples: how many samples it is from.
        paired: whether two runs were resampled together.
    """

    value: float
    low: float | None
    high: float | None
    samples: int
    paired: bool = False


def speed_interval(
    samples: Mapping[str, Speed], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> Interval | None:
    """Tokens per second, all tokens over all seconds; None without samples.

    Args:
        samples: tokens and seconds by sample.
        resamples, level, seed: draws, coverage, and what makes the draws repeatable.
    """
    table = _table(samples)
    if not len(table):
        return None
    value = table[:, 0].sum() / table[:, 1].sum()
    if len(table) < 2:
        return Interval(float(value), None, None, len(table))
    sums = table[_draws(len(table), resamples, seed)].sum(axis=1)
    return Interval(float(value), *_ends(sums[:, 0] / sums[:, 1], level), len(table))


def speedup_interval(
    ours: Mapping[str, Speed],
    baseline: Mapping[str, Speed],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> Interval | None:
    """How many times faster than the baseline; None without samples in both.

    Paired over the samples that both have, when there are at least two of those: estimate and interval are then from
    these alone. Otherwise each side is resampled by itself, over all it has.

    Args:
        ours, baseline: tokens and seconds by sample; equal keys mean the same prompt.
        resamples, level, seed: as in :func:`speed_interval`.
    """
    ours, baseline = _timed(ours), _timed(baseline)
    common = [key for key in ours if key in baseline]
    paired = len(common) >= 2
    if paired:
        ours, baseline = ({key: side[key] for key in common} for side in (ours, baseline))
    a, b = _table(ours), _table(baseline)
    if not len(a) or not len(b):
        return None
    value = float(_ratio(a.sum(axis=0), b.sum(axis=0)))
    if min(len(a), len(b)) < 2:
        return Interval(value, None, None, min(len(a), len(b)))
    draws_a = _draws(len(a), resamples, seed)
    draws_b = draws_a if paired else _draws(len(b), resamples, seed + 1)
    ratios = _ratio(a[draws_a].sum(axis=1).T, b[draws_b].sum(axis=1).T)
    return Interval(value, *_ends(ratios, level), min(len(a), len(b)), paired)


def _timed(samples: Mapping[str, Speed]) -> dict[str, Speed]:
    """Samples that have a speed: one whose prefill was its only pass has none."""
    return {key: speed for key, speed in samples.items() if speed[0] > 0 and speed[1] > 0}


def _table(samples: Mapping[str, Speed]) -> np.ndarray:
    """float64 [samples, 2]: tokens, seconds."""
    return np.array([speed for _, speed in sorted(_timed(samples).items())], dtype=np.float64).reshape(-1, 2)


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """int64 [resamples, count]: which samples are in each draw."""
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours[0] / ours[1]) / (theirs[0] / theirs[1])


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
