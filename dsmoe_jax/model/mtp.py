"""Multi-token prediction (V3 section 2.2): modules that predict tokens further ahead.

Module k = 1 ... K predicts, at position i, the token k + 1 ahead, from the representation of the
module before it (k = 1: the model's) and the embedding of the token k ahead (V3 eqs. 21-23):

    h'_i = M [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})]
    h_i^k = Block(h'_i),  P(t_{i+k+1}) = Head(RMSNorm(h_i^k))

Embedding and head are the model's.  Where the paper is silent this follows the released weights: a
representation is what the head gets, so it is normed; each module has a norm of its own; M takes
the embedding first (the paper writes it second).

A position takes part if the token k ahead is in its document; the others are padding to the module.

Shapes: B sequences, S positions, D hidden, J two vectors of D side by side, K modules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.moe.report import LayerReport
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.nn.layers import RMSNorm, init_matrix, linear


class Module(nnx.Module):
    """One module, without embedding and head.

    Args:
      config: of the model.
      block: its Transformer block.
      rngs: to draw from.
    """

    def __init__(self, config: ModelConfig, block: nnx.Module, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.embedding_norm = RMSNorm(d, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(d, config.rms_norm_eps)
        self.projection_DJ = init_matrix(rngs, (d, 2 * d), config.initializer_range)
        self.block = block
        self.final_norm = RMSNorm(d, config.rms_norm_eps)

    def __call__(
        self, hidden_BSD: jax.Array, embedded_BSD: jax.Array, *of_block: Any
    ) -> tuple[jax.Array, LayerReport | None, Any]:
        """The representation of further tokens.

        Args:
          hidden_BSD: the representation before it, normed.
          embedded_BSD: embedding of the token k ahead of each position.
          *of_block: what the block takes besides activations.

        Returns:
          The new representation, normed; report and cache of the block.
        """
        with jax.named_scope("mtp"):
            normed = self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)
            x_BSD = linear(jnp.concatenate(normed, axis=-1), self.projection_DJ)
        x_BSD, report, cache = self.block(x_BSD, *of_block)
        return self.final_norm(x_BSD), report, cache


def check(config: ModelConfig) -> None:
    """Refuses a router that learns from the loss of the next token.

    Raises:
      ValueError: naming the section.
    """
    if config.mtp is None or not config.moe.n_routed_experts:
        return
    require(
        not get_router(config.moe)[0].samples,
        "model.mtp",
        config.mtp,
        f"the {config.moe.router.name} router learns from the loss of the next token, not from that"
        " of tokens further ahead; must be None",
    )


class Ahead(NamedTuple):
    """Predictions of all modules for a batch, undefined where `segment_ids` has 0.

    Attributes:
      nll_KBS: negative log-likelihood of the token k + 1 ahead in nats, float32.
      agrees_KBS: whether the module's best token is the model's best one at the place from which
        the model predicts the same token: then a draft would be accepted.
    """

    nll_KBS: jax.Array
    agrees_KBS: jax.Array


def ahead(x_BS: jax.Array, k: int) -> jax.Array:
    """The values k positions ahead, 0 behind the end of the sequence."""
    return jnp.pad(x_BS, [(0, 0), (0, k)])[:, k:]


def all_ahead(x_BS: jax.Array, depth: int) -> jax.Array:
    """The values 1, 2, ... `depth` positions ahead, (K, B, S)."""
    return jnp.stack([ahead(x_BS, k) for k in range(1, depth + 1)])


def segment_ids(segment_ids_BS: jax.Array, depth: int) -> jax.Array:
    """The document of each position, (K, B, S), 0 where a module predicts nothing.

    The token that it would predict, k + 1 ahead, is the target of the position k ahead: that must
    be in the same document.
    """
    same_KBS = all_ahead(segment_ids_BS, depth) == segment_ids_BS
    return jnp.where(same_KBS, segment_ids_BS, 0)
