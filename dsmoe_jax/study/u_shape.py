"""U-shape in granularity: a quadratic in its logarithm (arXiv 2507.17702).

There the logarithm of the efficiency leverage (how many times the compute of a dense model a
mixture saves at the same loss) is a quadratic in log G, with its optimum at G of 8 to 12, where
G = 2 hidden size / expert width.  An expert that is m times smaller than a standard FFN of width
8/3 hidden size has G = 3 m / 4.  The same curve through the loss itself has its optimum at nearly
the same place; it is what can be fitted without a baseline.

Shapes: P points, R resamples.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

GRANULARITY_PER_SPLIT = 0.75  # 2 d / (8 d / 3 / m) = 3 m / 4


@dataclasses.dataclass(frozen=True)
class UShape:
    """y = q0 + q1 log G + q2 (log G)^2 between two granularities; higher y is better.

    Attributes:
      coefficients: (q0, q1, q2).
      low, high: ends of the sweep.
      error: root mean square of what the curve leaves over, in the unit of y.
    """

    coefficients: tuple[float, float, float]
    low: float
    high: float
    error: float

    def predict(self, G: Any) -> np.ndarray:
        """y at granularities."""
        return np.polynomial.polynomial.polyval(np.log(G), self.coefficients)

    @property
    def optimum(self) -> float | None:
        """The granularity of the highest y; None if it is not inside the sweep."""
        _, slope, bend = self.coefficients
        if bend >= 0:
            return None
        log_G = -slope / (2 * bend)
        inside = math.log(self.low) < log_G < math.log(self.high)
        return math.exp(log_G) if inside else None

    @property
    def best(self) -> float:
        """The granularity of the highest y in the sweep: the optimum, or an end."""
        if self.optimum is not None:
            return self.optimum
        at_low, at_high = self.predict([self.low, self.high])
        return self.low if at_low > at_high else self.high


def fit_u_shape(G_P: Any, y_P: Any) -> UShape:
    """Fits the quadratic by least squares.

    Args:
      G_P: granularities; four different ones or more, above 0.
      y_P: what is better where it is higher: minus the loss, or the logarithm of the leverage.

    Raises:
      ValueError: for fewer than four granularities, or values that are not finite.
    """
    G_P = np.asarray(G_P, np.float64)
    y_P = np.asarray(y_P, np.float64)
    if len(np.unique(G_P)) < 4 or G_P.min() <= 0:
        raise ValueError(
            f"granularities={G_P.tolist()}: a U-shape needs four different ones, above 0"
        )
    if not np.isfinite(y_P).all():
        raise ValueError(f"values={y_P.tolist()}: must be finite")
    coefficients = np.polynomial.polynomial.polyfit(np.log(G_P), y_P, 2)
    left_P = np.polynomial.polynomial.polyval(np.log(G_P), coefficients) - y_P
    q0, q1, q2 = coefficients.tolist()
    error = float(np.sqrt(np.mean(left_P**2)))
    return UShape((q0, q1, q2), float(G_P.min()), float(G_P.max()), error)
