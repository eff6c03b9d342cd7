"""Percentile bootstrap (Efron, 1979) of speeds and speed-ups, over samples.

A speed is all tokens over all seconds; draws differ in the samples they contain. Two runs of the same prompts are
resampled together ("paired"): the speeds of one prompt are correlated, so that the ratio varies less than either speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""Number of draws: sufficient for two digits of a 95 % interval."""

LEVEL = 0.95

SEED = 0

Speed = tuple[float, float]
"""Tokens and seconds of a sample."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval.

    Attributes:
        value: estimate from all samples.
        low, high: ends of the interval; None with fewer than two samples.
        samples: number of samples.
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
        resamples, level, seed: number of draws, coverage, seed of the draws.
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
    """Ratio to the speed of the baseline; None without samples in both.

    Paired if both have at least two samples in common; estimate and interval are then of these alone. Otherwise each
    side is resampled separately over all its samples.

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
    """Samples with a speed: a sample that ended with its prefill has none."""
    return {key: speed for key, speed in samples.items() if speed[0] > 0 and speed[1] > 0}


def _table(samples: Mapping[str, Speed]) -> np.ndarray:
    """float64 [samples, 2]: tokens, seconds."""
    return np.array([speed for _, speed in sorted(_timed(samples).items())], dtype=np.float64).reshape(-1, 2)


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """int64 [resamples, count]: samples of each draw."""
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours[0] / ours[1]) / (theirs[0] / theirs[1])


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
