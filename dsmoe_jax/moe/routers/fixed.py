"""Routers that learn nothing, and tables from token ids or tasks to experts.

Shapes: T tokens, E routed experts, K activated per token, V vocabulary, A tasks.
"""

from __future__ import annotations

import heapq

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config.checks import require
from dsmoe_jax.moe.routers.settings import RouterSettings
from dsmoe_jax.moe.types import RouterInputs, Routing

TABLES = ("random", "frequency")


def hash_tokens(logits: None, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """Hash layers: a fixed table from token id to expert, nothing learned (2106.04426 section 3).

    With the option table="random" it is a hash of (token id, seed), evaluated instead of stored;
    with "frequency" it is a variable of the layer, see `balanced_table`.  The gate is 1.
    """
    del logits
    if "table_V" in inputs.state:
        ids_T = inputs.state["table_V"][inputs.token_ids_T]
    else:
        ids_T = hash_expert(inputs.token_ids_T, settings.n_experts, settings.option("seed"))
    return Routing(ids_T[:, None], jnp.ones((*ids_T.shape, 1), jnp.float32), None)


def first_table(settings: RouterSettings) -> dict[str, jax.Array]:
    """A table in which every token is unassigned; nothing for the option table="random"."""
    table = settings.option("table")
    require(table in TABLES, "model.moe.router.options.table", table, f"must be one of {TABLES}")
    if table == "random":
        return {}
    return {"table_V": jnp.full((settings.vocab_size,), settings.n_experts, jnp.int32)}


def table_from_counts(counts_V: np.ndarray, settings: RouterSettings) -> dict[str, np.ndarray]:
    """The table that balances the training text; nothing for the option table="random".

    Args:
      counts_V: how often each token is an input of the training text.
      settings: of the layer's router.
    """
    if settings.option("table") == "random":
        return {}
    return {"table_V": balanced_table(counts_V, settings.n_experts)}


def balanced_table(counts_V: np.ndarray, n_experts: int) -> np.ndarray:
    """Balanced assignment of token ids by frequency (2106.04426 section 3.1).

    Greedy: the most frequent remaining token goes to the expert with the smallest load so far.  An
    unseen token counts as seen once, so that unseen ones are spread too; ties go to lower numbers.

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


def first_choices(settings: RouterSettings) -> dict[str, jax.Array]:
    """A table in which every token is unassigned."""
    shape = settings.vocab_size, settings.k
    return {"table_VK": jnp.full(shape, settings.n_experts, jnp.int32)}


def choices_from_counts(counts_V: np.ndarray, settings: RouterSettings) -> dict[str, np.ndarray]:
    """The table of K different experts for each token that balances the training text.

    Args:
      counts_V: how often each token is an input of the training text.
      settings: of the layer's router, with its seed.
    """
    seed = settings.option("seed")
    return {"table_VK": balanced_choices(counts_V, settings.n_experts, settings.k, seed)}


def balanced_choices(counts_V: np.ndarray, n_experts: int, k: int, seed: int) -> np.ndarray:
    """K different experts for each token id, by frequency as in `balanced_table`.

    The most frequent remaining token goes to the K experts with the smallest loads so far.  Of
    equal loads the order is random: else rare tokens, which all count once, would have the same few
    sets of K experts.

    Args:
      counts_V: how often each token is an input of the training text.
      n_experts: E.
      k: K.
      seed: of the order among equal loads.

    Returns:
      int32 (V, K).
    """
    counts_V = np.maximum(counts_V, 1)
    rng = np.random.default_rng(seed)
    table_VK = np.zeros((len(counts_V), k), np.int32)
    load = [(0, draw, i) for i, draw in enumerate(rng.random(n_experts))]
    heapq.heapify(load)
    draws_VK = rng.random((len(counts_V), k))
    for token in np.argsort(-counts_V, kind="stable"):
        smallest = [heapq.heappop(load) for _ in range(k)]
        table_VK[token] = [expert for _, _, expert in smallest]
        for (so_far, _, expert), draw in zip(smallest, draws_VK[token], strict=True):
            heapq.heappush(load, (so_far + int(counts_V[token]), draw, expert))
    return table_VK


def task_table(logits: None, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """The K experts of a task by a fixed table, with gates of 1 (2110.03742, by label alone).

    The experts of a document are then one dense FFN, beside the shared ones.
    """
    del logits
    ids_TK = inputs.state["table_AK"][inputs.task_ids_T]
    gate = settings.config.routed_scaling_factor
    return Routing(ids_TK, jnp.full(ids_TK.shape, gate, jnp.float32), None)


def first_task_table(settings: RouterSettings) -> dict[str, jax.Array]:
    """The table of a new layer, (A, K) for A tasks: the experts in their order, round after round.

    So every expert has as many tasks as any other, or one more.  Tasks share none as long as there
    are A K experts.
    """
    tasks = len(settings.config.tasks)
    n_routed = settings.n_experts - settings.n_identity
    places_AK = jnp.arange(tasks * settings.k, dtype=jnp.int32).reshape(tasks, settings.k)
    return {"table_AK": places_AK % n_routed}


def hash_expert(token_ids: jax.Array, n_experts: int, seed: int) -> jax.Array:
    """The expert of each token id: 32-bit integer finaliser (MurmurHash3's), then modulo E."""
    x = token_ids.astype(jnp.uint32) + jnp.uint32((seed * 0x9E3779B9 + 0x9E3779B9) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x = x ^ (x >> 16)
    return (x % jnp.uint32(n_experts)).astype(jnp.int32)


def uniform(logits: None, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """Assignment n goes to expert n mod E, with gate 1/K: forced balance, for tests and benchmarks.

    n counts the assignments of the global batch, whatever the number of micro-batches.  Published
    speeds of MoE layers are mostly measured like this.
    """
    del logits
    t = len(inputs.token_ids_T)
    k = settings.k
    e = settings.n_experts
    sequence_ids_B = inputs.sequences()
    per_sequence = t * k // len(sequence_ids_B)
    n = sequence_ids_B[:, None] * (per_sequence % e) + jnp.arange(per_sequence)
    ids_TK = (n % e).reshape(t, k)
    return Routing(ids_TK, jnp.full((t, k), 1 / k, jnp.float32), None)


def first_experts(logits: None, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """`uniform` for a token without a place in a batch: it goes to the first K experts."""
    del logits
    ids_TK = jnp.tile(jnp.arange(settings.k), (len(inputs.token_ids_T), 1))
    return Routing(ids_TK, jnp.full(ids_TK.shape, 1 / settings.k, jnp.float32), None)


def replay(logits: None, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """The recorded experts with the recorded gates, in training and in evaluation.

    Raises:
      ValueError: for a text without recorded routing.
    """
    del logits
    if inputs.replayed is None:
        raise ValueError(
            f"model.moe.router.name={settings.config.name!r}: there is no recorded routing for"
            " this text; only the recorded run's training and held-out batches can be replayed"
        )
    return Routing(inputs.replayed.ids, inputs.replayed.gates, None)
