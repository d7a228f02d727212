"""Causal self-attention with rotary positions and grouped keys and values.

Shapes: B sequences, S query positions, L key positions (S, or the cache's length), D hidden,
N query heads, M key/value heads, H head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.nn.layers import init_matrix
from dsmoe_jax.parallel.sharding import constrain


class KVCache(NamedTuple):
    """Keys and values of the positions generated so far, for one layer.

    Attributes:
      keys_BLMH, values_BLMH: filled up to the current length; what lies past it is masked.
    """

    keys_BLMH: jax.Array
    values_BLMH: jax.Array


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


class Attention(nnx.Module):
    """Multi-head attention; with fewer key/value heads than heads, grouped-query (2305.13245)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, n, m = (
            config.hidden_size,
            config.attention.num_attention_heads,
            config.attention.num_key_value_heads,
        )
        h, std = config.attention.head_dim, config.initializer_range
        self.theta = config.attention.rope_theta
        self.query_NHD = init_matrix(rngs, (n, h, d), std)
        self.key_MHD = init_matrix(rngs, (m, h, d), std)
        self.value_MHD = init_matrix(rngs, (m, h, d), std)
        self.out_DNH = init_matrix(rngs, (d, n, h), std)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BSL: jax.Array,
        cache: KVCache | None = None,
        cache_length: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies attention.

        Args:
          x_BSD: activations.
          positions_BS: int32, the position of each token in its document.
          mask_BSL: bool, which keys each query may see (causal, within the document).
          cache: keys and values so far; the new ones are written at `cache_length`.
          cache_length: how many positions of the cache are filled.

        Returns:
          y_BSD and the updated cache (None if none was given).
        """
        dtype = x_BSD.dtype
        project = lambda w: jnp.einsum("bsd,nhd->bsnh", x_BSD, w[...].astype(dtype))  # noqa: E731
        query = rotate(project(self.query_NHD), positions_BS, self.theta)
        key = rotate(project(self.key_MHD), positions_BS, self.theta)
        value = project(self.value_MHD)
        if cache is not None:
            at = (0, cache_length, 0, 0)
            key = jax.lax.dynamic_update_slice(cache.keys_BLMH, key, at)
            value = jax.lax.dynamic_update_slice(cache.values_BLMH, value, at)
            cache = KVCache(key, value)
        query, key, value = (
            constrain(query, "BSNH"),
            constrain(key, "BSMH"),
            constrain(value, "BSMH"),
        )
        y_BSNH = jax.nn.dot_product_attention(query, key, value, mask=mask_BSL[:, None])
        return jnp.einsum("bsnh,dnh->bsd", y_BSNH, self.out_DNH[...].astype(dtype)), cache
