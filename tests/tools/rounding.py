"""Bounds of the error of float32: tolerances that come from the arithmetic.

A `Bounded` is an array in float64 beside a bound on the error of the same computation in float32.
A product of matrices errs by at most n + 1 roundings of its n absolute terms (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1), whatever the order in which they are added up and
whether products are fused or not; a function of one argument by its slope times the argument's
error, plus its own error.  So the bound holds on every processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ROUNDING = 2.0**-24  # to float32, relative
Function = Callable[[np.ndarray], np.ndarray]


class Bounded(NamedTuple):
    """Exact values, and how far a computation in float32 may be from them."""

    value: np.ndarray
    error: np.ndarray

    @classmethod
    def exact(cls, x: np.ndarray) -> Bounded:
        """An input, which is the same number in both."""
        x = np.asarray(x, np.float64)
        return cls(x, np.zeros_like(x))

    def __matmul__(self, w: np.ndarray) -> Bounded:
        rounded = (len(w) + 1) * ROUNDING * np.abs(self.value)
        return Bounded(self.value @ w, (rounded + self.error) @ np.abs(w))

    def __mul__(self, other: Bounded) -> Bounded:
        a, b = np.abs(self.value), np.abs(other.value)
        error = a * other.error + self.error * b + self.error * other.error
        return Bounded(self.value * other.value, error + ROUNDING * a * b)

    def __add__(self, other: Bounded) -> Bounded:
        value = self.value + other.value
        return Bounded(value, self.error + other.error + ROUNDING * np.abs(value))

    def through(self, function: Function, slope: Function, own: np.ndarray) -> Bounded:
        """A function of each entry.

        Args:
          function: in float64.
          slope: its derivative.
          own: bound on its error in float32 at an exact argument.
        """
        slopes = [np.abs(slope(self.value + i * self.error)) for i in (-1, 0, 1)]
        return Bounded(function(self.value), np.max(slopes, axis=0) * self.error + own)

    def assert_holds(self, found: np.ndarray) -> None:
        """Fails where a value found in float32 is farther away than the bound, or is NaN."""
        off = np.abs(np.asarray(found, np.float64) - self.value)
        times = (off / np.maximum(self.error, 1e-300)).max()
        assert (off <= self.error).all(), f"{times:.3g} times the bound on the rounding error"
