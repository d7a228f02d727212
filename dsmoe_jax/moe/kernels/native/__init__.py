"""Kernels for CPU in float32: the experts (`experts.py`) and the work around them (`rows.py`).

They need a C++ compiler on the machine, see `build`.  `kernels/rows.py` and the backends of
`moe/experts.py` compute the same without one.
"""

from __future__ import annotations

import functools
import logging

from dsmoe_jax.moe.kernels.native import rows
from dsmoe_jax.moe.kernels.native.build import NotBuilt, library
from dsmoe_jax.moe.kernels.native.experts import run

__all__ = ["NotBuilt", "is_there", "library", "rows", "run"]


@functools.cache
def is_there() -> bool:
    """Whether the kernels are compiled, or can be now; warns if not."""
    try:
        library()
    except NotBuilt as error:
        # The results are the same: without a warning a user would only find that it is slow.
        logging.getLogger(__name__).warning("model.moe.expert_backend: 'blocked' (%s)", error)
        return False
    return True
