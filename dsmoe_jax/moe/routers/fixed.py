"""Routers that learn nothing.

Shapes: T tokens, E routed experts, K activated per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.types import RouterInputs, Routing


def hash_tokens(logits: None, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """Hash layers: a fixed random table from token id to expert, nothing learned (2106.04426).

    The table is a hash of (token id, seed), evaluated instead of stored; the gate is 1.
    """
    del logits
    ids_T = hash_expert(inputs.token_ids_T, config.n_routed_experts, config.hash_seed)
    return Routing(ids_T[:, None], jnp.ones((*ids_T.shape, 1), jnp.float32), None)


def hash_expert(token_ids: jax.Array, n_experts: int, seed: int) -> jax.Array:
    """The expert of each token id: 32-bit integer finaliser (MurmurHash3's), then modulo E."""
    x = token_ids.astype(jnp.uint32) + jnp.uint32((seed * 0x9E3779B9 + 0x9E3779B9) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x = x ^ (x >> 16)
    return (x % jnp.uint32(n_experts)).astype(jnp.int32)


def uniform(logits: None, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """Assignment n goes to expert n mod E, with gate 1/K: forced balance, for tests and benchmarks.

    Published speeds of MoE layers are mostly measured like this; it routes by position alone.
    """
    del logits
    t, k = len(inputs.token_ids_T), config.num_experts_per_tok
    ids_TK = (jnp.arange(t * k, dtype=jnp.int32) % config.n_routed_experts).reshape(t, k)
    return Routing(ids_TK, jnp.full((t, k), 1 / k, jnp.float32), None)
