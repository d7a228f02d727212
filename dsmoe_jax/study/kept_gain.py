"""The share of a gain that another arm keeps: (worse - arm) / (worse - better), over seeds.

Both differences are noisy, and the interval is Fieller's: all shares s for which
(worse - arm) - s (worse - better) is not clearly other than 0, seed by seed.  So the end of the
interval is where the verdict on a claim `claims.keeps` turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsmoe_jax.study import spread


class Kept(NamedTuple):
    """A share of a gain.

    Attributes:
      share: from the means over the seeds.
      interval: that holds it with 95 %; None with one seed, or where the gain itself may be 0.
    """

    share: float
    interval: tuple[float, float] | None


def kept(kept_S: Sequence[float], gain_S: Sequence[float]) -> Kept | None:
    """The share with its interval; None if there is no gain in the mean.

    Args:
      kept_S: worse - arm, by seed.
      gain_S: worse - better, of the same seeds.
    """
    part, whole = float(np.mean(kept_S)), float(np.mean(gain_S))
    if whole <= 0:
        return None
    n = len(gain_S)
    if n < 2:
        return Kept(part / whole, None)
    # Half the interval of a mean is this times the standard deviation of its values.
    times_squared = spread.quantile(n - 1) ** 2 / n
    covariance = np.cov(kept_S, gain_S)
    # The ends are the roots of a s^2 - 2 b s + c.
    a = whole**2 - times_squared * covariance[1, 1]
    b = part * whole - times_squared * covariance[0, 1]
    c = part**2 - times_squared * covariance[0, 0]
    if a <= 0:
        return Kept(part / whole, None)
    half = math.sqrt(max(b * b - a * c, 0.0)) / a
    return Kept(part / whole, (b / a - half, b / a + half))
