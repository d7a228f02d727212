"""The rotary position embedding against complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.nn.attention.rope import rotate


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-3), ("bfloat16", 0.03)])
def test_rotation_far_into_a_document(dtype, atol):
    """Pairs as complex numbers, times e^(i position theta^(-2i/H)); bfloat16 has no 1001."""
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8)).astype(dtype)
    got = rotate(x, jnp.array([[1001, 4095]]), AttentionConfig())
    assert got.dtype == dtype
    pairs = np.asarray(x[..., :4], np.float64) + 1j * np.asarray(x[..., 4:], np.float64)
    angle = np.array([1001, 4095])[:, None, None] * 10_000.0 ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * angle)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=atol)
