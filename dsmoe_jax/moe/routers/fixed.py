"""Routers that learn nothing.

Shapes: T tokens, E routed experts, K activated per token, V vocabulary.
"""

from __future__ import annotations

import heapq

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.types import RouterInputs, Routing


def hash_tokens(logits: None, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """Hash layers: a fixed table from token id to expert, nothing learned (2106.04426 section 3).

    With `hash_table="random"` it is a hash of (token id, seed), evaluated instead of stored; with
    "frequency" the layer has it, from `balanced_table`.  The gate is 1.
    """
    del logits
    if inputs.table_V is not None:
        ids_T = inputs.table_V[inputs.token_ids_T]
    else:
        ids_T = hash_expert(inputs.token_ids_T, config.n_routed_experts, config.hash_seed)
    return Routing(ids_T[:, None], jnp.ones((*ids_T.shape, 1), jnp.float32), None)


def balanced_table(counts_V: np.ndarray, n_experts: int) -> np.ndarray:
    """Balanced assignment of token ids by frequency (2106.04426 section 3.1).

    Greedily: the most frequent token that is left goes to the expert with the least so far.  A
    token that was never seen counts as one, so that those too are spread; ties go to lower numbers.

    Args:
      counts_V: how often each token is an input of the training text.
      n_experts: E.

    Returns:
      int32 expert of each token id.
    """
    counts_V = np.maximum(counts_V, 1)
    table_V = np.zeros(len(counts_V), np.int32)
    load = [(0, i) for i in range(n_experts)]  # a heap
    for token in np.argsort(-counts_V, kind="stable"):
        so_far, expert = load[0]
        table_V[token] = expert
        heapq.heapreplace(load, (so_far + int(counts_V[token]), expert))
    return table_V


def hash_expert(token_ids: jax.Array, n_experts: int, seed: int) -> jax.Array:
    """The expert of each token id: 32-bit integer finaliser (MurmurHash3's), then modulo E."""
    x = token_ids.astype(jnp.uint32) + jnp.uint32((seed * 0x9E3779B9 + 0x9E3779B9) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x = x ^ (x >> 16)
    return (x % jnp.uint32(n_experts)).astype(jnp.int32)


def uniform(logits: None, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """Assignment n goes to expert n mod E, with gate 1/K: forced balance, for tests and benchmarks.

    The assignments are counted through the global batch, in any number of micro-batches.
    Published speeds of MoE layers are mostly measured like this; it routes by position alone.
    """
    del logits
    t, k = len(inputs.token_ids_T), config.num_experts_per_tok
    places_B = inputs.places()
    per_sequence = t * k // len(places_B)
    n = places_B[:, None] * (per_sequence % config.n_routed_experts) + jnp.arange(per_sequence)
    ids_TK = (n % config.n_routed_experts).reshape(t, k)
    return Routing(ids_TK, jnp.full((t, k), 1 / k, jnp.float32), None)


def replay(logits: None, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """The recorded experts with the recorded gates, in training and in evaluation.

    Raises:
      ValueError: for a text without recorded routing.
    """
    del logits
    if inputs.replayed is None:
        raise ValueError(
            f"model.moe.router.name={config.router!r}: there is no recorded routing for this text;"
            " only the recorded run's training and held-out batches can be replayed"
        )
    return Routing(*inputs.replayed, None)
