"""Interface of an attention kernel, and what it is asked to compute.

Shapes: B sequences, S query positions, L key positions, N query heads, M key/value heads, H size of
a query and a key, I size of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.nn.attention.mask import CausalMask

# `(query_BSNH, key_BLMH, value_BLMI, mask) -> y_BSNI`: softmax(Q K^T / sqrt(H)) V in the dtype of
# the query.  Query head n goes with key head n // (N / M).
Attend = Callable[[jax.Array, jax.Array, jax.Array, CausalMask], jax.Array]


class Task(NamedTuple):
    """A computation as kernels are asked about it, known before anything runs.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      length: S.
      key_size: H.
      value_size: I.
      dtype: of queries, keys and values.
      documents: whether a sequence may hold several documents, or padding.
      cache: whether the keys are those of a cache.
    """

    platform: str
    length: int
    key_size: int
    value_size: int
    dtype: jnp.dtype
    documents: bool
    cache: bool = False


class Kernel(NamedTuple):
    """A kernel in the registry.

    Attributes:
      attend: the function.
      refuse: says why it cannot compute a task and what would be right; "" if it can.
      per_shard: whether it must be called on each shard of a mesh, since XLA cannot split it.
      keeps_scores: whether scores are arrays in the device's memory.
    """

    attend: Attend
    refuse: Callable[[Task], str]
    per_shard: bool = False
    keeps_scores: bool = False
