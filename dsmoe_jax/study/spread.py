"""Confidence intervals of means and differences over a few seeds.

Runs of one seed see the same data in the same order, so part of the spread is common to all arms.
The model is value = arm + seed + noise: the noise is what is left after every arm's and every
seed's mean, with (A - 1)(S - 1) degrees of freedom for A arms and S seeds.  The interval of a
difference of two arms is +- t * noise * sqrt(2 / S) (95 %, Student's t, each pair by itself).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
BySeed = Mapping[str, Mapping[int, float]]  # label -> seed -> value of a measure


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    if not values:
        return None, None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), spread


def common_seeds(values: BySeed) -> list[int]:
    """Seeds that every arm with results has."""
    return sorted(set.intersection(*map(set, values.values()))) if values else []


def table_of(values: BySeed, labels: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Values as a table: a row a seed, a column a label."""
    return np.array([[values[label][seed] for label in labels] for seed in seeds], np.float64)


def difference_half_width(values: BySeed) -> float | None:
    """Half the 95 % interval of a difference of two arms; None with one arm or one seed."""
    seeds = common_seeds(values)
    degrees = difference_degrees(values)
    if not degrees:
        return None
    table = np.array([[by_seed[seed] for seed in seeds] for by_seed in values.values()])
    noise = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    variance = float((noise**2).sum()) / degrees
    return quantile(degrees) * math.sqrt(2 * variance / len(seeds))


def difference_degrees(values: BySeed) -> int:
    """Degrees of freedom of a difference of two arms; 0 with one arm or one seed."""
    return max(len(values) - 1, 0) * max(len(common_seeds(values)) - 1, 0)


def p_value(value: float, half_width: float, degrees: int) -> float:
    """Two-sided p of a true value of 0 (Student's t).

    Args:
      value: found.
      half_width: of its 95 % interval.
      degrees: of freedom.
    """
    if half_width == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * stats.t.sf(abs(value) / half_width * quantile(degrees), degrees))


def mean_half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    deviation = float(np.std(values, ddof=1))
    return quantile(len(values) - 1) * deviation / math.sqrt(len(values))


def quantile(degrees: int) -> float:
    """Half the 95 % interval of a mean in units of its standard error (Student's t)."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))
