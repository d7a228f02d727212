"""The decoder-only Transformer around the MoE layer.

Leading dense layers are separate modules; the MoE layers are one module whose parameters carry a
leading layer axis, run by `jax.lax.scan`, so compile time does not grow with depth.

Shapes: B sequences, S positions, L key positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.report import LayerReport
from dsmoe_jax.moe.types import MoEInputs, RecordedRouting
from dsmoe_jax.nn.attention import Attention, KVCache
from dsmoe_jax.nn.layers import RMSNorm, SwiGLU, init_matrix, linear
from dsmoe_jax.parallel.sharding import constrain, gathered

# What the backward pass recomputes instead of keeping.
REMAT_POLICIES: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul results
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only each layer's input
}


class Cache(NamedTuple):
    """The KV cache of a whole model.

    Attributes:
      leading: one `KVCache` a leading dense layer.
      stacked: one `KVCache` with a leading layer axis for the scanned layers.
      length: int32, positions filled so far, the same for every sequence.
    """

    leading: tuple[KVCache, ...]
    stacked: KVCache
    length: jax.Array


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
      logits_BSV: float32.
      router_stats: of the MoE layers, every leaf with a leading layer axis; None without routed
        experts.
      cache: updated, if one was given.
    """

    logits_BSV: jax.Array
    router_stats: LayerReport | None
    cache: Cache | None


class Block(nnx.Module):
    """Pre-norm attention and feed-forward with residuals; `dense` leaves out the MoE."""

    def __init__(self, config: ModelConfig, *, dense: bool, rngs: nnx.Rngs):
        d = config.hidden_size
        self.attention_norm = RMSNorm(d, config.rms_norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = RMSNorm(d, config.rms_norm_eps)
        self.dense = dense
        if dense:
            self.ffn = SwiGLU(d, config.intermediate_size, config.initializer_range, rngs=rngs)
        else:
            self.moe = MoELayer(
                config.moe,
                hidden_size=d,
                vocab_size=config.vocab_size,
                initializer_range=config.initializer_range,
                rngs=rngs,
            )

    def __call__(self, x_BSD, inputs: _Inputs, cache: KVCache | None, rng=None, replayed=None):
        """Returns the block's output, its router statistics (or None) and the updated cache."""
        with jax.named_scope("attention"):
            y_BSD, cache = self.attention(
                self.attention_norm(x_BSD), inputs.positions_BS, inputs.mask_BSL, cache,
                inputs.cache_length,
            )  # fmt: skip
        x_BSD = x_BSD + y_BSD
        normed_BSD, stats = self.ffn_norm(x_BSD), None
        if self.dense:
            y_BSD = self.ffn(normed_BSD)
        else:
            moe_inputs = MoEInputs(
                inputs.token_ids_BS, inputs.valid_BS, rng, inputs.sequence_B, replayed
            )
            y_BSD, stats = self.moe(normed_BSD, moe_inputs)
        return constrain(x_BSD + y_BSD, "BSD"), stats, cache


class _Inputs(NamedTuple):
    """What every block sees besides the activations."""

    token_ids_BS: jax.Array
    positions_BS: jax.Array
    mask_BSL: jax.Array
    valid_BS: jax.Array
    sequence_B: jax.Array | None
    cache_length: jax.Array | int


class Transformer(nnx.Module):
    """The model: `Transformer(config, rngs=nnx.Rngs(seed))`; `model(tokens_BS) -> logits_BSV`.

    Raises:
      ValueError: at construction, for a name in the config that no registry has.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.remat not in REMAT_POLICIES:
            raise ValueError(f"model.remat={config.remat!r}: must be one of {list(REMAT_POLICIES)}")
        self.config = config
        std, n_leading = config.initializer_range, config.first_k_dense_replace
        self.embedding_VD = init_matrix(rngs, (config.vocab_size, config.hidden_size), std)
        self.leading = nnx.List([Block(config, dense=True, rngs=rngs) for _ in range(n_leading)])

        @nnx.split_rngs(splits=config.num_hidden_layers - n_leading)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dense=False, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_VD = init_matrix(rngs, (config.vocab_size, config.hidden_size), std)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Logits (float32, B x S x V) of whole single-document sequences."""
        return self.forward(tokens_BS).logits_BSV

    def forward(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
        cache: Cache | None = None,
        rng: jax.Array | None = None,
        sequence_B: jax.Array | None = None,
        replayed: RecordedRouting | None = None,
    ) -> Output:
        """Runs the model.

        Args:
          tokens_BS: int32 token ids.
          segment_ids_BS: int32, which document each token is of; 0 is padding.  Tokens see only
            earlier tokens of their own document.  None: one document a sequence.
          positions_BS: int32, position within the document; None: 0, 1, 2, ...
          cache: to continue after the positions it holds (single-document sequences only).
          rng: random key for routers that act at random in training; None is evaluation.
          sequence_B: int32, the place of each sequence in the global batch; None: 0, 1, 2, ...
          replayed: recorded routing, ids and gates of shape (B, L, S, K), for routers that replay;
            in evaluation in place of any router's.
        """
        inputs = self._inputs(tokens_BS, segment_ids_BS, positions_BS, cache, sequence_B)
        table_VD = gathered(self.embedding_VD[...], "VD")
        x_BSD = constrain(table_VD[tokens_BS].astype(compute_dtype(self.config)), "BSD")
        leading = []
        for i, block in enumerate(self.leading):
            x_BSD, _, kv = block(x_BSD, inputs, cache.leading[i] if cache else None)
            leading.append(kv)
        graph, params = nnx.split(self.layers)

        def layer(x_BSD, scanned):
            params, kv, rng, replayed = scanned
            x_BSD, stats, kv = nnx.merge(graph, params)(x_BSD, inputs, kv, rng, replayed)
            return x_BSD, (stats, kv)

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat])
        n_scanned = self.config.num_hidden_layers - self.config.first_k_dense_replace
        rngs_L = None if rng is None else jax.random.split(rng, n_scanned)
        replayed_L = jax.tree.map(lambda x: x.swapaxes(0, 1), replayed)
        scanned: Any = (params, cache.stacked if cache else None, rngs_L, replayed_L)
        x_BSD, (stats, stacked) = jax.lax.scan(layer, x_BSD, scanned)
        with jax.named_scope("head"):
            logits_BSV = linear(self.final_norm(x_BSD), self.head_VD).astype(jnp.float32)
            logits_BSV = constrain(logits_BSV, "BSV")
        if cache is not None:
            assert stacked is not None
            cache = Cache(tuple(leading), stacked, cache.length + tokens_BS.shape[1])
        return Output(logits_BSV, stats, cache)

    def _inputs(
        self, tokens_BS, segment_ids_BS, positions_BS, cache: Cache | None, sequence_B
    ) -> _Inputs:
        b, s = tokens_BS.shape
        start = 0 if cache is None else cache.length
        index_S = start + jnp.arange(s)
        keys_L = index_S if cache is None else jnp.arange(cache.stacked.keys_BLMH.shape[2])
        mask_BSL = jnp.broadcast_to(index_S[:, None] >= keys_L, (b, s, keys_L.size))
        if segment_ids_BS is not None:
            assert cache is None, "a cache continues single documents"
            mask_BSL &= segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(index_S, (b, s))
        valid_BS = jnp.ones((b, s), bool) if segment_ids_BS is None else segment_ids_BS > 0
        return _Inputs(tokens_BS, positions_BS, mask_BSL, valid_BS, sequence_B, start)


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations: as configured, or float32 on CPU and bfloat16 elsewhere."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def init_cache(config: ModelConfig, batch: int, max_length: int) -> Cache:
    """An empty cache for `batch` sequences of up to `max_length` positions."""
    shape = (batch, max_length, config.attention.num_key_value_heads, config.attention.head_dim)
    dtype, leading = compute_dtype(config), config.first_k_dense_replace
    empty = lambda *lead: KVCache(*(jnp.zeros((*lead, *shape), dtype) for _ in range(2)))  # noqa: E731
    stacked = empty(config.num_hidden_layers - leading)
    return Cache(tuple(empty() for _ in range(leading)), stacked, jnp.int32(0))
