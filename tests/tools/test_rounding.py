"""Bounds on rounding errors: they hold for float32, and not for what is wrong by a thousandth."""

import numpy as np
import pytest

from tests.tools.rounding import ROUNDING, Bounded


def computed(x, w, dtype):
    """tanh(x w) x w + x w in a precision."""
    z = x.astype(dtype) @ w.astype(dtype)
    return np.tanh(z) * z + z


def bounded(x, w):
    z = Bounded.exact(x) @ w.astype(np.float64)
    own = 4 * ROUNDING * np.ones_like(z.value)
    return z.through(np.tanh, lambda z: 1 - np.tanh(z) ** 2, own) * z + z


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_bound_holds_and_is_no_wider_than_it_must_be(scale):
    rng = np.random.default_rng(0)
    x = np.float16(rng.standard_normal((9, 30))).astype(np.float32) * np.float32(scale)
    w = np.float16(rng.standard_normal((30, 20))).astype(np.float32)
    bound = bounded(x, w)
    bound.assert_holds(computed(x, w, np.float32))
    wrong = computed(x, w, np.float32) * np.float32(1 + 1e-3)
    with pytest.raises(AssertionError, match="times the bound"):
        bound.assert_holds(wrong)
    wrong = np.where(np.arange(20) == 3, np.nan, bound.value)
    with pytest.raises(AssertionError):
        bound.assert_holds(wrong)
