"""Rotary position embedding.

Shapes: B sequences, S positions, N heads, H head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x_BSNH: jax.Array, positions_BS: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (2104.09864), in the pairing (i, i + H/2) of Hugging Face's Llama.

    Pair i is turned by the angle position * theta^(-2i/H), computed in float32; returns the dtype
    of `x_BSNH`.
    """
    half = x_BSNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BS[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSNH.dtype)
