"""One layer of the Transformer: attention and a feed-forward network, which may be an MoE layer.

Shapes: B sequences, S positions, L key positions, D hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.model.types import Cache, ModelInputs
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.report import LayerReport
from dsmoe_jax.moe.types import MoEInputs, RecordedRouting
from dsmoe_jax.nn import attention
from dsmoe_jax.nn.attention import CausalMask
from dsmoe_jax.nn.feed_forward import FeedForward, form_of
from dsmoe_jax.nn.layers import RMSNorm
from dsmoe_jax.parallel.sharding import constrain


class EveryLayer(NamedTuple):
    """Inputs that all layers share, besides the activations."""

    token_ids_BS: jax.Array
    positions_BS: jax.Array
    mask: CausalMask
    valid_BS: jax.Array
    segment_ids_BS: jax.Array | None
    sequence_ids_B: jax.Array | None
    cache_length: jax.Array | int
    task_ids_BS: jax.Array | None


class OneLayer(NamedTuple):
    """Inputs of a single layer; for the scan with a leading layer axis."""

    cache: Any = None
    rng: jax.Array | None = None
    replayed: RecordedRouting | None = None
    left_out_E: jax.Array | None = None


class Block(nnx.Module):
    """Pre-norm attention and feed-forward with residuals; the latter is an MoE layer or `dense`."""

    def __init__(self, config: ModelConfig, *, dense: bool, rngs: nnx.Rngs):
        d = config.hidden_size
        std = config.initializer_range
        self.attention_norm = RMSNorm(d, config.rms_norm_eps)
        make_attention = attention.get(config.attention).module
        self.attention = make_attention(
            d, std, config.attention, rms_norm_eps=config.rms_norm_eps, rngs=rngs
        )
        self.ffn_norm = RMSNorm(d, config.rms_norm_eps)
        self.dense = dense
        if dense:
            form = form_of(config.moe.expert)
            self.ffn = FeedForward(d, config.intermediate_size, std, form, rngs=rngs)
        else:
            self.moe = MoELayer(
                config.moe,
                hidden_size=d,
                vocab_size=config.vocab_size,
                initializer_range=std,
                rngs=rngs,
            )

    def __call__(
        self,
        x_BSD: jax.Array,
        every: EveryLayer,
        one: OneLayer,
        intervention: Intervention = interventions.NONE,
    ) -> tuple[jax.Array, LayerReport | None, Any]:
        """Returns the block's output, the report of its MoE layer (or None), the updated cache."""
        with jax.named_scope("attention"):
            normed_BSD = self.attention_norm(x_BSD)
            y_BSD, cache = self.attention(
                normed_BSD, every.positions_BS, every.mask, one.cache, every.cache_length
            )
        chex.assert_equal_shape([x_BSD, y_BSD])
        x_BSD = x_BSD + y_BSD
        normed_BSD = self.ffn_norm(x_BSD)
        report = None
        if self.dense:
            with jax.named_scope("dense_ffn"):
                y_BSD = self.ffn(normed_BSD)
        else:
            moe_inputs = MoEInputs(
                every.token_ids_BS,
                every.valid_BS,
                one.rng,
                every.sequence_ids_B,
                one.replayed,
                every.segment_ids_BS,
                one.left_out_E,
                every.task_ids_BS,
            )
            y_BSD, report = self.moe(normed_BSD, moe_inputs, intervention)
        chex.assert_equal_shape([x_BSD, y_BSD])
        return constrain(x_BSD + y_BSD, "BSD"), report, cache

    def alone(self, x_BSD: jax.Array, inputs: ModelInputs) -> tuple[jax.Array, LayerReport | None]:
        """The block by itself, to compare layer by layer.

        Args:
          x_BSD: its input.
          inputs: the batch.
        """
        x_BSD, report, _ = self(x_BSD, inputs_of_every_layer(inputs, None), OneLayer())
        return x_BSD, report


def inputs_of_every_layer(inputs: ModelInputs, cache: Cache | None) -> EveryLayer:
    """Positions and validity of the tokens, and the keys that each query may see."""
    b, s = inputs.tokens_BS.shape
    segment_ids_BS = inputs.segment_ids_BS
    positions_BS = inputs.positions_BS
    if cache is None:
        start = 0
        mask = CausalMask(segment_ids_BS)
        default_BS = jnp.broadcast_to(jnp.arange(s), (b, s))
    else:
        start = cache.length
        if segment_ids_BS is None:
            segment_ids_BS = jnp.ones((b, s), jnp.int32)
        key_ids_BL = jax.lax.dynamic_update_slice(cache.segment_ids_BL, segment_ids_BS, (0, start))
        mask = CausalMask(segment_ids_BS, start, cache.max_length, key_ids_BL)
        default_BS = _tokens_before(cache, segment_ids_BS)
    if positions_BS is None:
        positions_BS = default_BS
    valid_BS = jnp.ones((b, s), bool) if segment_ids_BS is None else segment_ids_BS > 0
    return EveryLayer(
        inputs.tokens_BS,
        positions_BS,
        mask,
        valid_BS,
        segment_ids_BS,
        inputs.sequence_ids_B,
        start,
        inputs.task_ids_BS,
    )


def _tokens_before(cache: Cache, segment_ids_BS: jax.Array) -> jax.Array:
    """Number of each sequence's tokens before each new one, padding not counted."""
    # What lies past the length was taken back (a draft that was wrong).
    filled_L = jnp.arange(cache.max_length) < cache.length
    cached_B = ((cache.segment_ids_BL > 0) & filled_L).sum(axis=1)
    valid_BS = segment_ids_BS > 0
    return cached_B[:, None] + jnp.cumsum(valid_BS, axis=1) - valid_BS


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations: as configured, or float32 on CPU and bfloat16 elsewhere."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)
