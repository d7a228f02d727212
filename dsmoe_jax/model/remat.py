"""Rematerialisation: what the backward pass of a layer recomputes instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Remat(NamedTuple):
    """A kind of rematerialisation.

    Attributes:
      policy: says what `jax.checkpoint` keeps of a layer; None: no checkpoint, all is kept.
      whole_layers: whether a layer is computed again from its input alone, the exchange of tokens
        included.
    """

    policy: Callable[..., Any] | None
    whole_layers: bool = False


REMAT: dict[str, Remat] = {
    "none": Remat(None),
    "dots": Remat(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),  # keep matmul results
    "full": Remat(jax.checkpoint_policies.nothing_saveable, whole_layers=True),
}


def get(name: str) -> Remat:
    """The entry of `model.remat`.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in REMAT:
        raise ValueError(f"model.remat={name!r}: must be one of {list(REMAT)}")
    return REMAT[name]
