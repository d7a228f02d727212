"""Intervals of numbers that are fitted to mean losses: a bootstrap over seeds.

All arms of a seed stay together, because they share data and order.  Drawing whole seeds would not
do: of three seeds there are ten draws, which hold the truth three times in four at best.  So each
seed gets a random weight instead, normal and divided by a random deviation of S - 1 degrees of
freedom.  The means of the resamples then have Student's t distribution around the mean, and for a
number that is linear in the losses the interval is the usual one of Student; for a fitted constant
it is whatever the fit makes of the same losses.

Shapes: S seeds, P arms or points, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from dsmoe_jax.study.spread import CONFIDENCE

RESAMPLES = 300


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    low: float
    high: float


def resampled_means(losses_SP: np.ndarray) -> np.ndarray | None:
    """Mean losses as other seeds might have given them, (R, P); None with fewer than two seeds.

    The random weights are the same for every table of as many seeds, so that what is fitted to
    parts of a table, one after the other, is resampled together.

    Args:
      losses_SP: a row a seed, a column an arm.
    """
    losses_SP = np.asarray(losses_SP, np.float64)
    n_seeds = len(losses_SP)
    if n_seeds < 2:
        return None
    count = RESAMPLES
    rng = np.random.default_rng(0)
    weights_RS = rng.standard_normal((count, n_seeds))
    # Evenly spread over their distribution: its small values make the tails.
    shares_R = rng.permutation((np.arange(count) + 0.5) / count)
    spread_R = np.sqrt(stats.chi2.ppf(shares_R, n_seeds - 1) / (n_seeds - 1))
    weights_RS /= spread_R[:, None] * np.sqrt(n_seeds * (n_seeds - 1))
    mean_P = losses_SP.mean(axis=0)
    return mean_P + weights_RS @ (losses_SP - mean_P)


def interval(values_R: np.ndarray) -> Interval:
    """The middle 95 % of the values of the resamples; infinite values count as far out."""
    tail = (1 - CONFIDENCE) / 2
    # No interpolation: between a number and infinity there is nothing.
    low, high = np.quantile(values_R, (tail, 1 - tail), method="nearest")
    return Interval(float(low), float(high))
