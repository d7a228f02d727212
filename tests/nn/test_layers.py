"""The small parts of every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.nn.layers import RMSNorm


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
