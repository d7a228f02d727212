"""The routers' variables that are no parameters: how they begin, and how a step moves them.

Shapes: L MoE layers, E routed experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import Config
from dsmoe_jax.config.checks import require
from dsmoe_jax.moe.layer import HashTable, RouterBias
from dsmoe_jax.moe.legacy import flat
from dsmoe_jax.moe.routers.fixed import balanced_table


def make_hash_table(
    config: Config, token_counts: Callable[[], np.ndarray] | None
) -> np.ndarray | None:
    """The table_V that is even on the training text; None for a config that has no such table.

    Args:
      config: of the run.
      token_counts: how often each token is an input of the training text; called if needed.

    Raises:
      ValueError: if it is needed and None.
    """
    moe = flat(config.model.moe)
    if moe.hash_table != "frequency":
        return None
    require(
        token_counts is not None,
        "model.moe.router.options.table",
        "frequency",
        "needs token counts",
    )
    assert token_counts is not None
    counted = token_counts()
    counts_V = np.zeros(config.model.vocab_size, np.int64)
    counts_V[: len(counted)] = counted  # a tokenizer may leave rows of the embedding unused
    return balanced_table(counts_V, moe.n_routed_experts)


def fill_hash_tables(other: nnx.State, table_V: jax.Array) -> nnx.State:
    """Gives every layer the table."""
    tables, rest = nnx.split_state(other, HashTable, ...)
    fill = lambda table_LV: jnp.broadcast_to(table_V, table_LV.shape)  # noqa: E731
    return nnx.merge_state(jax.tree.map(fill, tables), rest)


def move_bias(other: nnx.State, load_LE: jax.Array, speed: float) -> nnx.State:
    """Loss-free balancing: `b_i += speed * sign(mean load - load_i)` (2408.15664 algorithm 1).

    Args:
      other: with one `RouterBias` of shape (L, E), that of the stacked MoE layers.
      load_LE: assignments of the whole global batch.
      speed: gamma.
    """
    bias, rest = nnx.split_state(other, RouterBias, ...)
    below_LE = jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    return nnx.merge_state(jax.tree.map(lambda b_LE: b_LE + speed * below_LE, bias), rest)
