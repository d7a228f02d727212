"""A global batch computed in parts, one after the other: cut up, added up, put together again.

Shapes: B sequences of the global batch, b of a micro-batch, n micro-batches, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.parallel import sharding


def split(batch: Batch, n_micro: int) -> tuple[Batch, jax.Array]:
    """The micro-batches along a new leading axis, with their sequences' places in the batch.

    Noise and protection go by these places: they are the same in any number of micro-batches.
    """
    whole = batch, jnp.arange(len(batch["tokens_BS"]))
    if n_micro == 1:
        return jax.tree.map(lambda x: x[None], whole)

    def cut(x_B: jax.Array) -> jax.Array:
        # Every n-th row, not a block of them: then no row leaves its device.
        micros = x_B.reshape(-1, n_micro, *x_B.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(micros, "LB" + "S" * (x_B.ndim - 1))

    return jax.tree.map(cut, whole)


def join(micros: Any) -> Any:
    """Puts the rows that `split` has cut apart back in order: (n, L, b, ...) -> (L, b n, ...)."""
    back = lambda x: jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])  # noqa: E731
    return jax.tree.map(back, micros)


def add_up(part_of: Callable[[Any], tuple[Any, Any]], micros: Any) -> tuple[Any, Any]:
    """`part_of` of the micro-batches, one after the other: its first results' sum, all second ones.

    The second ones are along a new leading axis.
    """
    first = jax.tree.map(lambda x: x[0], micros)
    if len(jax.tree.leaves(micros)[0]) == 1:
        total, each = part_of(first)
        return total, jax.tree.map(lambda x: x[None], each)
    shapes, _ = jax.eval_shape(part_of, first)

    def add(total, micro):
        part, each = part_of(micro)
        return jax.tree.map(jnp.add, total, part), each

    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), micros)
