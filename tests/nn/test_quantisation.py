"""Matrices of whole numbers: the bound on their error, and products against plain numpy."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.nn.quantisation import Quantised, dequantise, quantise, scale_name, times
from tests.tools.rounding import ROUNDING

SIZES = st.floats(2**-100, 1e3, width=32)
NUMBERS = st.one_of(st.just(0.0), SIZES, SIZES.map(lambda x: -x))


def by_formula(w, bits=8):
    """Values and scales of a matrix, (..., O, I), in numpy."""
    most = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(axis=-1) * np.float32(1 / most)
    safe = np.where(scale > 0, scale, np.float32(1))[..., None]
    return np.rint(w / safe).astype(np.int8), scale


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def compiled(bits):
    return jax.jit(functools.partial(quantise, bits=bits))


@hypothesis.given(
    small=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=NUMBERS),
    bits=st.sampled_from([2, 4, 7, 8]),
)
@hypothesis.settings(deadline=None, max_examples=100)
def test_a_weight_is_off_by_half_a_scale_at_most(small, bits):
    w = np.zeros((4, 9), np.float32)  # all sizes in one, which is compiled once
    w[: small.shape[0], : small.shape[1]] = small
    found = compiled(bits)(w)
    values, scale = by_formula(w, bits)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.scale, scale)
    off = np.abs(np.float64(w) - np.float64(values) * np.float64(scale)[..., None])
    assert (off <= np.float64(scale)[..., None] / 2 + 2 * ROUNDING * np.abs(w)).all()
    assert np.abs(values).max() <= 2 ** (bits - 1) - 1


def test_outputs_of_zeros():
    w = normal(3, 5)
    w[1] = 0
    found = quantise(jnp.asarray(w))
    assert found.scale[1] == 0
    assert (np.asarray(dequantise(found))[1] == 0).all()
    assert np.isfinite(np.asarray(times(jnp.zeros((2, 5)), found))).all()


def test_a_product_is_that_of_the_dequantised_matrix():
    x_NI, w_OI = normal(6, 32), normal(7, 32, seed=1)
    values, scale = by_formula(w_OI)
    found = times(jnp.asarray(x_NI), Quantised(jnp.asarray(values), jnp.asarray(scale)))
    wanted = np.float64(x_NI) @ (np.float64(values) * np.float64(scale)[:, None]).T
    bound = 34 * ROUNDING * (np.abs(x_NI) @ np.abs(w_OI).T)
    assert (np.abs(found - wanted) <= 1.01 * bound).all()


def test_sums_of_whole_numbers_are_exact():
    """Inputs of 8 bits: int32 sums, then two scales."""
    x_NI, w_OI = normal(6, 700), normal(7, 700, seed=1)
    x_NI[2] = 0
    (x, x_scale), (w, w_scale) = by_formula(x_NI), by_formula(w_OI)
    sums = x.astype(np.int64) @ w.astype(np.int64).T
    wanted = sums * np.float64(x_scale)[:, None] * np.float64(w_scale)
    found = times(jnp.asarray(x_NI), Quantised(jnp.asarray(w), jnp.asarray(w_scale), True))
    np.testing.assert_allclose(found, wanted, rtol=4 * ROUNDING)
    assert (np.asarray(found)[2] == 0).all()


def test_in_bfloat16_the_whole_numbers_are_exact():
    x_NI = jnp.asarray(normal(4, 16), jnp.bfloat16)
    values, scale = by_formula(normal(5, 16, seed=1))
    found = times(x_NI, Quantised(jnp.asarray(values), jnp.asarray(scale)))
    assert found.dtype == jnp.float32
    wanted = np.asarray(x_NI, np.float64) @ (values * np.float64(scale)[:, None]).T
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wanted"), [("gate_EFD", "gate_scale_EF"), ("down_DF", "down_scale_D")]
)
def test_the_name_says_the_axes_of_the_scales(name, wanted):
    assert scale_name(name) == wanted
