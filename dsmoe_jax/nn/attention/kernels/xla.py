"""Attention as XLA compiles it: it writes the scores to memory, but computes every task.

Shapes: B sequences, S query positions, L key positions, N query heads, M key/value heads, H size of
a query and a key, I size of a value, G query heads of each key/value head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsmoe_jax.nn.attention.kernels.types import Task
from dsmoe_jax.nn.attention.mask import CausalMask

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # a score that is still finite with one more


def attend(
    query_BSNH: jax.Array, key_BLMH: jax.Array, value_BLMI: jax.Array, mask: CausalMask
) -> jax.Array:
    """Attention with the mask as an array; scores, their exponentials and sums are float32.

    The sums of values are divided, not the shares of each score: L / I times fewer numbers.
    """
    b, s, n, h = query_BSNH.shape
    m = key_BLMH.shape[2]
    query_BMGSH = query_BSNH.reshape(b, s, m, n // m, h).transpose(0, 2, 3, 1, 4)
    key_BMLH, value_BMLI = key_BLMH.swapaxes(1, 2), value_BLMI.swapaxes(1, 2)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bmgsh,bmlh->bmgsl", query_BMGSH, key_BMLH) * h**-0.5
    scores = jnp.where(mask.dense(b, s)[:, None, None], scores, _MASKED)
    # Any number in place of the largest would do, so it has no gradient.
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    shares = jnp.exp(scores - largest)
    y_BMGSI = product("bmgsl,bmli->bmgsi", shares.astype(value_BLMI.dtype), value_BMLI)
    y_BMGSI /= shares.sum(axis=-1, keepdims=True)
    y_BSNI = y_BMGSI.transpose(0, 3, 1, 2, 4).reshape(b, s, n, -1)
    return y_BSNI.astype(query_BSNH.dtype)


def widened(x: jax.Array, size: int) -> jax.Array:
    """Zeros behind the last axis up to a size, or the array itself if it is as large."""
    missing = size - x.shape[-1]
    if missing <= 0:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def refuse(task: Task) -> str:
    """Nothing is refused."""
    del task
    return ""
