"""Causal self-attention with rotary positions and grouped keys and values (2305.13245).

Shapes: B sequences, S query positions, L key positions (S, or the cache's length), D hidden,
N query heads, M key/value heads, H head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.nn.attention import kernels
from dsmoe_jax.nn.attention.mask import CausalMask
from dsmoe_jax.nn.attention.rope import rotate
from dsmoe_jax.nn.attention.types import Activations
from dsmoe_jax.nn.layers import init_matrix
from dsmoe_jax.parallel.sharding import constrain


class KVCache(NamedTuple):
    """Keys and values of the positions generated so far, for one layer.

    Attributes:
      keys_BLMH, values_BLMH: filled up to the current length; what lies past it is masked.
    """

    keys_BLMH: jax.Array
    values_BLMH: jax.Array


class GroupedAttention(nnx.Module):
    """Multi-head attention; with fewer key/value heads than heads, grouped-query (2305.13245).

    Args:
      hidden_size: D.
      initializer_range: standard deviation of every matrix at the start.
      config: heads, head size, rotation and kernel.
      rngs: for the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        initializer_range: float,
        config: AttentionConfig,
        *,
        rngs: nnx.Rngs,
    ):
        d = hidden_size
        h = config.head_dim
        n, m = _heads(config)
        self.theta = config.rope_theta
        self.kernel = config.kernel
        self.query_NHD = init_matrix(rngs, (n, h, d), initializer_range)
        self.key_MHD = init_matrix(rngs, (m, h, d), initializer_range)
        self.value_MHD = init_matrix(rngs, (m, h, d), initializer_range)
        self.out_DNH = init_matrix(rngs, (d, n, h), initializer_range)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask: CausalMask,
        cache: KVCache | None = None,
        cache_length: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies attention; see `Attention.module` for arguments and result."""
        query_BSNH = rotate(_project(x_BSD, self.query_NHD), positions_BS, self.theta)
        key_BLMH = rotate(_project(x_BSD, self.key_MHD), positions_BS, self.theta)
        value_BLMH = _project(x_BSD, self.value_MHD)
        if cache is not None:
            at = (0, cache_length, 0, 0)
            key_BLMH = jax.lax.dynamic_update_slice(cache.keys_BLMH, key_BLMH, at)
            value_BLMH = jax.lax.dynamic_update_slice(cache.values_BLMH, value_BLMH, at)
            cache = KVCache(key_BLMH, value_BLMH)
        query_BSNH = constrain(query_BSNH, "BSNH")
        key_BLMH = constrain(key_BLMH, "BSMH")
        value_BLMH = constrain(value_BLMH, "BSMH")
        y_BSNH = kernels.attend(self.kernel, query_BSNH, key_BLMH, value_BLMH, mask)
        out_DNH = self.out_DNH[...].astype(x_BSD.dtype)
        return jnp.einsum("bsnh,dnh->bsd", y_BSNH, out_DNH), cache


def _project(x_BSD: jax.Array, weight_NHD: nnx.Param[jax.Array]) -> jax.Array:
    """Activations by head, (B, S, N, H)."""
    return jnp.einsum("bsd,nhd->bsnh", x_BSD, weight_NHD[...].astype(x_BSD.dtype))


def _heads(config: AttentionConfig) -> tuple[int, int]:
    """Query heads and key/value heads."""
    n = config.num_attention_heads
    return n, config.num_key_value_heads or n


def empty_cache(config: AttentionConfig, batch: int, max_length: int, dtype: jnp.dtype) -> KVCache:
    """A cache of one layer with no position filled."""
    _, m = _heads(config)
    shape_BLMH = (batch, max_length, m, config.head_dim)
    return KVCache(jnp.zeros(shape_BLMH, dtype), jnp.zeros(shape_BLMH, dtype))


def parameters(hidden_size: int, config: AttentionConfig) -> int:
    """Parameters of one layer: queries and output, keys and values."""
    n, m = _heads(config)
    return 2 * hidden_size * config.head_dim * (n + m)


def head_sizes(config: AttentionConfig) -> tuple[int, int]:
    """Sizes of a query or key, and of a value."""
    return config.head_dim, config.head_dim


def train_flops(config: AttentionConfig, length: int) -> int:
    """Training FLOPs of one token's scores and values, 12 S (N x H)."""
    # Two products (scores, values) of 2 FLOPs a number; backward costs twice as much as forward.
    return 12 * length * config.num_attention_heads * config.head_dim


def activations(config: AttentionConfig, length: int) -> Activations:
    """Numbers that one layer holds for each token: queries, keys, values; scores; result."""
    n, m = _heads(config)
    h = config.head_dim
    return Activations(projected=(n + 2 * m) * h, scores=n * length, result=n * h)
