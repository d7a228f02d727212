"""The small parts of every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.nn.layers import RMSNorm, linear, linear_to_float32


def bfloat16(size, key):
    return jax.random.normal(jax.random.key(key), size).astype(jnp.bfloat16)


def assert_float32_sums(found, x, w):
    """Checks sums of n products in any order: an addition errs by half an eps at most."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    bound = w.shape[-1] * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(w).T)
    assert (np.abs(np.asarray(found) - x @ w.T) <= bound).all()


@pytest.mark.parametrize("n", [32, 500])
def test_sums_are_handed_on_in_float32(n):
    x, w = bfloat16((3, 7, n), 0), bfloat16((40, n), 1)
    found = linear_to_float32(x, nnx.Param(w.astype(jnp.float32)))
    assert found.dtype == jnp.float32
    assert_float32_sums(found, x, w)
    with pytest.raises(AssertionError):
        assert_float32_sums(linear(x, nnx.Param(w)).astype(jnp.float32), x, w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gradient_is_that_of_linear(dtype):
    """Bit for bit; in float32 the values too."""
    x, weight = bfloat16((5, 32), 0).astype(dtype), bfloat16((9, 32), 1).astype(jnp.float32)
    dy = jax.random.normal(jax.random.key(2), (5, 9))

    def plain(x, weight):
        return linear(x, nnx.Param(weight)).astype(jnp.float32)

    def handed_on(x, weight):
        return linear_to_float32(x, nnx.Param(weight))

    want, wanted_gradient = jax.vjp(plain, x, weight)
    found, gradient = jax.vjp(handed_on, x, weight)
    for a, b in zip(gradient(dy), wanted_gradient(dy), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    if dtype == jnp.float32:
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("size", [1.0, 1e-3])  # epsilon counts for small activations only
def test_rms_norm_formula(size):
    x = size * np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    norm = RMSNorm(8, 1e-6)
    norm.scale_D[...] = jnp.arange(8.0)
    want = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * np.arange(8)
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=1e-5)


def test_rms_norm_is_computed_in_float32():
    norm = RMSNorm(64, 1e-6)
    x = jax.random.normal(jax.random.key(0), (5, 64)).astype(jnp.bfloat16)
    want = norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), want)
