"""Kernels for CPU in float32: the experts (`experts.py`) and what lies around them (`rows.py`).

They need a C++ compiler on the machine, see `build`.  What else computes the same is in
`moe/experts.py`, `dispatch/local.py` and `jax.lax.top_k`.
"""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp

from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.moe.kernels.native import rows
from dsmoe_jax.moe.kernels.native.build import NotBuilt, library
from dsmoe_jax.moe.kernels.native.experts import run

__all__ = ["NotBuilt", "is_there", "library", "rows", "run", "serves", "serves_alone"]


def serves(backend: str, *arrays: jax.Array) -> bool:
    """Whether `model.moe.expert_backend` means these kernels for work on `arrays`.

    "native" does, and "auto" on a CPU if they can be compiled; both in float32.
    """
    wanted = backend == "native" or (backend == "auto" and platform() == "cpu" and is_there())
    return wanted and all(array.dtype == jnp.float32 for array in arrays)


def serves_alone(backend: str, *arrays: jax.Array) -> bool:
    """`serves` on one device: XLA cannot split the work of a kernel over a mesh by itself."""
    return math.prod(jax.sharding.get_abstract_mesh().axis_sizes) == 1 and serves(backend, *arrays)


@functools.cache
def is_there() -> bool:
    """Whether the kernels are compiled, or can be now; warns if not."""
    try:
        library()
    except NotBuilt as error:
        # The results are the same, but nobody should wonder for an afternoon why it is slow.
        logging.getLogger(__name__).warning("model.moe.expert_backend: 'blocked' (%s)", error)
        return False
    return True
