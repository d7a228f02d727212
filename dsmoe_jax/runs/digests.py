"""A number for each array, the same under every sharding: a wrong byte in a checkpoint is noticed.

It is the sum of the bits of all elements, weighted by position, modulo 2^32.  Integer sums have no
rounding, so the order of adding, and with it the sharding, is free.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST = 2**20  # elements at a time


def digests(tree: Any) -> list[int]:
    """The digests of the arrays of a tree."""
    # One array after the other: a single program for all would hold a copy of the whole state.
    return [_digest(x) for x in jax.tree.leaves(tree)]


def _digest(x: jax.Array) -> int:
    (device, *others) = x.sharding.device_set
    if not others and device.platform == "cpu":
        # XLA would hold the array once more there, and compile a program for each shape.
        return digest_of_part(np.asarray(x), 0)
    return int(_digest_on_devices(x))


def digest_of_part(part: np.ndarray, offset: int) -> int:
    """The summand of a part of an array in its digest.

    Args:
      part: of an array, such that it lies in one piece in row-major order.
      offset: of its first element in the whole array.
    """
    bits = part.reshape(-1).view(f"u{part.itemsize}")
    total = 0
    for start in range(0, bits.size, _MOST):
        some = bits[start : start + _MOST].astype(np.uint32)
        position = np.arange(some.size, dtype=np.uint32) + np.uint32((offset + start) % 2**32)
        total += int((some * (2 * position + 1)).sum(dtype=np.uint32))
    return total % 2**32


@jax.jit
def _digest_on_devices(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # The position in row-major order, by axis: flattening would gather a sharded array.
    position = jnp.uint32(0)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        step = jnp.uint32(stride % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
        stride *= bits.shape[axis]
    return (bits * (2 * position + 1)).sum(dtype=jnp.uint32)
