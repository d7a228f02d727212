"""Routers: pure functions from logits to a `Routing`.

A new router is a function and a line in `ROUTERS`.  It knows no devices and owns no parameters;
the logits `u_t . e_i` are computed by the layer, in float32.

Shapes: T tokens, E routed experts, K activated ones per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.types import RouterInputs, Routing


def topk_softmax(logits_TE: jax.Array, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """Softmax over all routed experts, the K largest are chosen (V1 eqs. 9-11).

    The gates are the affinities themselves, as in V1; with `norm_topk_prob` they are renormalised
    to sum to one.  Ties go to the expert with the lower index.
    """
    del inputs
    affinity_TE = jax.nn.softmax(logits_TE, axis=-1)
    gates_TK, ids_TK = jax.lax.top_k(affinity_TE, config.num_experts_per_tok)
    if config.norm_topk_prob:
        gates_TK = gates_TK / gates_TK.sum(axis=-1, keepdims=True)
    return Routing(ids_TK, gates_TK * config.routed_scaling_factor, affinity_TE)


def switch(logits_TE: jax.Array, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """Switch Transformer: the one best expert, weighted by its probability (2101.03961 eq. 2)."""
    return topk_softmax(logits_TE, inputs, config)


def hash_tokens(logits_TE: None, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """Hash layers: a fixed random table from token id to expert, nothing learned (2106.04426).

    The table is a hash of (token id, seed), evaluated instead of stored; the gate is 1.
    """
    del logits_TE
    ids_T = hash_expert(inputs.token_ids_T, config.n_routed_experts, config.hash_seed)
    return Routing(ids_T[:, None], jnp.ones((*ids_T.shape, 1), jnp.float32), None)


def hash_expert(token_ids: jax.Array, n_experts: int, seed: int) -> jax.Array:
    """The expert of each token id: 32-bit integer finaliser (MurmurHash3's), then modulo E."""
    x = token_ids.astype(jnp.uint32) + jnp.uint32((seed * 0x9E3779B9 + 0x9E3779B9) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x = x ^ (x >> 16)
    return (x % jnp.uint32(n_experts)).astype(jnp.int32)


class Router(NamedTuple):
    """A registry line.

    Attributes:
      route: `(logits_TE, inputs, config) -> Routing`.
      learned: whether the layer has a matrix E x D that gives the logits (else they are None and
        the router has no affinities to balance).
      top1: whether the router is defined for K = 1 only.
    """

    route: Callable[..., Routing]
    learned: bool = True
    top1: bool = False


ROUTERS: dict[str, Router] = {
    "topk_softmax": Router(topk_softmax),
    "switch": Router(switch, top1=True),
    "hash": Router(hash_tokens, learned=False, top1=True),
}


def get_router(config: MoEConfig) -> Router:
    """The router of a config.

    Raises:
      ValueError: for an unknown name, or a config that the router cannot serve.
    """
    if config.router not in ROUTERS:
        raise ValueError(f"model.moe.router={config.router!r}: must be one of {sorted(ROUTERS)}")
    router = ROUTERS[config.router]
    if router.top1 and config.num_experts_per_tok != 1:
        raise ValueError(
            f"model.moe.num_experts_per_tok={config.num_experts_per_tok}:"
            f" the {config.router} router activates exactly 1 expert"
        )
    return router
