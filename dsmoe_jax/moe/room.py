"""Room for rows: memory that nobody has written yet.

The dispatchers and moe/blocks.py size their buffers for the worst case and write what comes.  What
is never written must never be read, in the forward pass or in a gradient; if it is, the values are
those of whatever was there before, and mostly plausible.  Under `poisoned` all of it is NaN, which
shows in the result: the start-up self-check (training/self_check/) runs so.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_POISONED = contextvars.ContextVar("poisoned", default=False)


def room(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An array of undefined values; of NaN if it is traced under `poisoned`."""
    if _POISONED.get():
        return jnp.full(shape, jnp.nan, dtype)
    return jax.lax.empty(shape, dtype)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills with NaN all room of what is traced in here."""
    token = _POISONED.set(True)
    try:
        yield
    finally:
        _POISONED.reset(token)
