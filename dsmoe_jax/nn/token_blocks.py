"""The logits of a batch in blocks of tokens, on every shard of the ambient mesh.

The head is collected over FSDP; its words stay split over `tensor`, and what is over all words is
summed there.

Shapes: B sequences, S positions, D hidden, V vocabulary; on a shard of the mesh t tokens, v words
of the vocabulary, and b tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsmoe_jax.parallel import sharding

IN_USE = PartitionSpec("tensor", None)  # the head as FSDP has gathered it


def logits_of_block(x_bD: jax.Array, head_vD: jax.Array) -> jax.Array:
    """Logits of this shard's words, float32 (b, v); the product is of the dtype of x."""
    return jnp.einsum("bd,vd->bv", x_bD, head_vD, preferred_element_type=jnp.float32)


def best_words(logits_bv: jax.Array, largest_b: jax.Array) -> jax.Array:
    """The first word, of all shards' vocabulary, with the largest logit, int32 (b,)."""
    last = jnp.iinfo(jnp.int32).max
    word_bv = jnp.where(logits_bv == largest_b[:, None], words(logits_bv), last)
    return over_vocabulary(jax.lax.pmin, word_bv.min(axis=1))


def words(logits_bv: jax.Array) -> jax.Array:
    """The words of this shard's vocabulary, int32 (v,)."""
    v = logits_bv.shape[1]
    first = jax.lax.axis_index("tensor") * v if axis_size("tensor") > 1 else 0
    return first + jnp.arange(v)


def cut(n_blocks: int, *arrays_BS: jax.Array) -> tuple[jax.Array, ...]:
    """The tokens in blocks of equal size along a new leading axis, filled up with zeros."""

    def one(x_BS: jax.Array) -> jax.Array:
        rest = x_BS.shape[2:]
        x_t = x_BS.reshape(-1, *rest)
        missing = -len(x_t) % n_blocks
        filled = jnp.pad(x_t, [(0, missing)] + [(0, 0)] * len(rest)) if missing else x_t
        return filled.reshape(n_blocks, -1, *rest)

    return tuple(one(x_BS) for x_BS in arrays_BS)


def joined(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Puts together what `cut` has cut, without what it has filled up."""
    x_t = blocks.reshape(-1, *blocks.shape[2:])
    return x_t[: math.prod(shape[:2])].reshape(shape)


def over_vocabulary(reduce: Callable[..., Any], x: Any) -> Any:
    """A sum or maximum over the parts of the vocabulary."""
    return reduce(x, "tensor") if axis_size("tensor") > 1 else x


def scattered(dhead_vD: jax.Array) -> jax.Array:
    """The sum over all shards' tokens, each device with the columns of D that it keeps."""
    # One axis after the other: over both at once a TPU adds the whole up on every device.
    for axis in ("fsdp", "expert"):
        if axis_size(axis) > 1:
            dhead_vD = jax.lax.psum_scatter(dhead_vD, axis, scatter_dimension=1, tiled=True)
    replicas = [axis for axis in ("stage", "data") if axis_size(axis) > 1]
    return jax.lax.psum(dhead_vD, replicas) if replicas else dhead_vD


def axis_size(axis: str) -> int:
    """Devices along an axis of the ambient mesh; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def on_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function on every shard of the ambient mesh; itself without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return sharding.on_shards(function, in_specs, out_specs)
