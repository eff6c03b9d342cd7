"""Percentile bootstrap (Efron, 1979) of speeds and speed-ups, over samples.

A speed is all tokens over all seconds; draws differ in the samples they contain. Two runs of the same prompts are
resampled together ("paired"): the speeds of one prompt are correlated, so that the ratio varies less than either speed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def speed_interval(samples: Mapping[str, Speed], *, level: float = LEVEL, seed: int = SEED) -> Interval | None:
    """Tokens per second, all tokens over all seconds; None without samples.

    Args:
        samples: tokens and seconds by sample.
        level, seed: coverage, seed of the draws.
    """
    return _interval([_timed(samples)], False, level, seed)


def speedup_interval(
    ours: Mapping[str, Speed], baseline: Mapping[str, Speed], *, level: float = LEVEL, seed: int = SEED
) -> Interval | None:
    """Ratio to the speed of the baseline; None without samples in both.

    Paired if both have at least two samples in common; estimate and interval are then of these alone. Otherwise each
    side is resampled separately over all its samples.

    Args:
        ours, baseline: tokens and seconds by sample; equal keys mean the same prompt.
        level, seed: as in :func:`speed_interval`.
    """
    sides = [_timed(ours), _timed(baseline)]
    common = sides[0].keys() & sides[1].keys()
    paired = len(common) >= 2
    if paired:
        sides = [{key: side[key] for key in common} for side in sides]
    return _interval(sides, paired, level, seed)


def _timed(samples: Mapping[str, Speed]) -> dict[str, Speed]:
    """Samples with a speed: a sample that ended with its prefill has none."""
    return {key: speed for key, speed in samples.items() if speed[0] > 0 and speed[1] > 0}


def _interval(sides: Sequence[Mapping[str, Speed]], paired: bool, level: float, seed: int) -> Interval | None:
    """Of the speed of one side, or of the ratio of two."""
    count = min(map(len, sides))
    if not count:
        return None
    # float64 [samples, 2]: tokens, seconds.
    tables = [np.array([speed for _, speed in sorted(side.items())], dtype=np.float64) for side in sides]
    value = float(_figure([table.sum(axis=0) for table in tables]))
    if count < 2:
        return Interval(value, None, None, count)
    sums = []
    for number, table in enumerate(tables):
        generator = np.random.default_rng(seed if paired else seed + number)
        draws = generator.integers(0, len(table), size=(RESAMPLES, len(table)))
        sums.append(table[draws].sum(axis=1).T)
    low, high = np.quantile(_figure(sums), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), count, paired)


def _figure(sums: Sequence[np.ndarray]) -> Any:
    speeds = [tokens / seconds for tokens, seconds in sums]
    return speeds[0] if len(speeds) == 1 else speeds[0] / speeds[1]
