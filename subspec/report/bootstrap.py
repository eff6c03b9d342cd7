"""Percentile bootstrap (Efron, 1979) of speeds and speed-ups, over samples.

A speed is all tokens over all seconds; draws differ in the samples they contain. Two runs of the same prompts are
resampled together ("paired"): the speeds of one prompt are correlated, so that the ratio varies less than either speed.

Samples are a data frame with the columns ``tokens`` and ``seconds`` (float64); equal labels mean the same prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES, SEED = 2000, 0  # draws: sufficient for two digits of a 95 % interval
LEVEL = 0.95  # coverage of the intervals


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


def speed_interval(samples: pd.DataFrame) -> Interval | None:
    """Tokens per second, all tokens over all seconds; None without samples."""
    return _interval([_timed(samples)], paired=False)


def speedup_interval(ours: pd.DataFrame, baseline: pd.DataFrame) -> Interval | None:
    """Ratio to the speed of the baseline; None without samples in both.

    Paired if both have at least two samples in common; estimate and interval are then of these alone. Otherwise each
    side is resampled separately over all its samples.
    """
    sides = [_timed(ours), _timed(baseline)]
    common = sides[0].index.intersection(sides[1].index)
    paired = len(common) >= 2
    return _interval([side.loc[common] for side in sides] if paired else sides, paired)


def _timed(samples: pd.DataFrame) -> pd.DataFrame:
    """Samples with a speed: a sample that ended with its prefill has none."""
    return samples[(samples.tokens > 0) & (samples.seconds > 0)]


def _interval(sides: Sequence[pd.DataFrame], paired: bool) -> Interval | None:
    """Of the speed of one side, or of the ratio of two."""
    count = min(map(len, sides))
    if not count:
        return None
    # float64 [samples, 2]: tokens, seconds.
    tables = [np.ascontiguousarray(side.sort_index()[["tokens", "seconds"]]) for side in sides]
    value = float(_figure([table.sum(axis=0) for table in tables]))
    if count < 2:
        return Interval(value, None, None, count)
    sums = []
    for number, table in enumerate(tables):
        generator = np.random.default_rng(SEED if paired else SEED + number)
        draws = generator.integers(0, len(table), size=(RESAMPLES, len(table)))
        sums.append(table[draws].sum(axis=1).T)
    low, high = np.quantile(_figure(sums), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), count, paired)


def _figure(sums: Sequence[np.ndarray]) -> Any:
    speeds = [tokens / seconds for tokens, seconds in sums]
    return speeds[0] if len(speeds) == 1 else speeds[0] / speeds[1]
