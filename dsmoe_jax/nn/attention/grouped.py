"""Causal self-attention with rotary positions and grouped keys and values (2305.13245).

Options (`model.attention.options`), as open families of models have them:

    bias      adds a learned bias to queries, keys and values (Qwen1.5-MoE)
    qk_norm   RMSNorm of queries and of keys before they are rotated, so that no score grows without
              bound (2302.05442): "none", "head" over each head (Qwen3), "all" over all heads
              together (OLMoE)

Shapes: B sequences, S query positions, L key positions (S, or the cache's length), D hidden,
N query heads, M key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.config.checks import checker
from dsmoe_jax.nn.attention import kernels
from dsmoe_jax.nn.attention.mask import CausalMask
from dsmoe_jax.nn.attention.rope import rotate
from dsmoe_jax.nn.attention.types import Activations
from dsmoe_jax.nn.layers import RMSNorm, init_matrix, linear_by_head
from dsmoe_jax.parallel.sharding import constrain


class Options(NamedTuple):
    """Settings that this attention alone has, with their defaults."""

    bias: bool = False
    qk_norm: str = "none"  # in `QK_NORM`


def options_of(config: AttentionConfig) -> Options:
    """The options of a config, with the defaults of missing ones filled in."""
    given: Any = config.options
    return Options(**given)


def _width_of_head(heads: int, head_dim: int) -> int:
    del heads
    return head_dim


def _width_of_all(heads: int, head_dim: int) -> int:
    return heads * head_dim


# How many numbers of queries or of keys are normalised together: `(heads, head size) -> width`;
# None: none are.
QK_NORM: dict[str, Callable[[int, int], int] | None] = {
    "none": None,
    "head": _width_of_head,
    "all": _width_of_all,
}


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
      config: heads, head size, rotation, kernel and options.
      rms_norm_eps: of the norms of queries and keys.
      rngs: for the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        initializer_range: float,
        config: AttentionConfig,
        *,
        rms_norm_eps: float,
        rngs: nnx.Rngs,
    ):
        d = hidden_size
        h = config.head_dim
        n, m = _heads(config)
        options = options_of(config)
        self.config = config
        self.query_NHD = init_matrix(rngs, (n, h, d), initializer_range)
        self.key_MHD = init_matrix(rngs, (m, h, d), initializer_range)
        self.value_MHD = init_matrix(rngs, (m, h, d), initializer_range)
        self.out_DNH = init_matrix(rngs, (d, n, h), initializer_range)
        self.bias = options.bias
        if options.bias:
            self.query_bias_NH = nnx.Param(jnp.zeros((n, h), jnp.float32))
            self.key_bias_MH = nnx.Param(jnp.zeros((m, h), jnp.float32))
            self.value_bias_MH = nnx.Param(jnp.zeros((m, h), jnp.float32))
        widths = _norm_widths(config)
        self.normed = widths is not None
        if widths is not None:
            self.query_norm = RMSNorm(widths[0], rms_norm_eps)
            self.key_norm = RMSNorm(widths[1], rms_norm_eps)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask: CausalMask,
        cache: KVCache | None = None,
        cache_length: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies attention; see `Attention.module` for arguments and result."""
        query_BSNH, key_BLMH, value_BLMH = self._projected(x_BSD)
        query_BSNH = rotate(query_BSNH, positions_BS, self.config)
        key_BLMH = rotate(key_BLMH, positions_BS, self.config)
        if cache is not None:
            at = (0, cache_length, 0, 0)
            key_BLMH = jax.lax.dynamic_update_slice(cache.keys_BLMH, key_BLMH, at)
            value_BLMH = jax.lax.dynamic_update_slice(cache.values_BLMH, value_BLMH, at)
            cache = KVCache(key_BLMH, value_BLMH)
        query_BSNH = constrain(query_BSNH, "BSNH")
        key_BLMH = constrain(key_BLMH, "BSMH")
        value_BLMH = constrain(value_BLMH, "BSMH")
        y_BSNH = kernels.attend(self.config.kernel, query_BSNH, key_BLMH, value_BLMH, mask)
        out_DNH = self.out_DNH[...].astype(x_BSD.dtype)
        return jnp.einsum("bsnh,dnh->bsd", y_BSNH, out_DNH), cache

    def _projected(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the new positions, with their biases and norms."""
        query_BSNH = linear_by_head(x_BSD, self.query_NHD)
        key_BSMH = linear_by_head(x_BSD, self.key_MHD)
        value_BSMH = linear_by_head(x_BSD, self.value_MHD)
        if self.bias:
            query_BSNH += self.query_bias_NH[...].astype(x_BSD.dtype)
            key_BSMH += self.key_bias_MH[...].astype(x_BSD.dtype)
            value_BSMH += self.value_bias_MH[...].astype(x_BSD.dtype)
        if self.normed:
            query_BSNH = _in_widths(self.query_norm, query_BSNH)
            key_BSMH = _in_widths(self.key_norm, key_BSMH)
        return query_BSNH, key_BSMH, value_BSMH


def _in_widths(norm: RMSNorm, x_BSNH: jax.Array) -> jax.Array:
    """Normalises a head, or all heads, together: as many numbers as the norm has scales."""
    b, s, _, _ = x_BSNH.shape
    by_width = x_BSNH.reshape(b, s, -1, norm.scale_D.shape[0])
    return norm(by_width).reshape(x_BSNH.shape)


def check(config: AttentionConfig) -> None:
    """Refuses an unknown norm."""
    options = options_of(config)
    known = f"must be one of {sorted(QK_NORM)}"
    checker(options, "model.attention.options.")("qk_norm", options.qk_norm in QK_NORM, known)


def _norm_widths(config: AttentionConfig) -> tuple[int, int] | None:
    """Scales of the norm of queries and of that of keys; None: there are none."""
    width_of = QK_NORM[options_of(config).qk_norm]
    if width_of is None:
        return None
    n, m = _heads(config)
    return width_of(n, config.head_dim), width_of(m, config.head_dim)


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
    """Parameters of one layer: queries and output, keys and values; their biases and norms."""
    n, m = _heads(config)
    h = config.head_dim
    biases = (n + 2 * m) * h if options_of(config).bias else 0
    norms = sum(_norm_widths(config) or ())
    return 2 * hidden_size * h * (n + m) + biases + norms


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
