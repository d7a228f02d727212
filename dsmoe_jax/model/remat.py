"""Rematerialisation: what the backward pass of a layer recomputes instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dsmoe_jax.nn import kept


class Remat(NamedTuple):
    """A kind of rematerialisation.

    Attributes:
      policy: says what `jax.checkpoint` keeps of a layer; None: no checkpoint, all is kept.
      again: whether the backward pass computes a layer again from its input and what is `kept`.
      kept: names of values (nn/kept.py) that are not computed again.
    """

    policy: Callable[..., Any] | None
    again: bool = False
    kept: tuple[str, ...] = ()


REMAT: dict[str, Remat] = {
    "none": Remat(None),
    "dots": Remat(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),  # keep matmul results
    # The exchange of tokens and the scores are not repeated; the rest of a layer is.
    "named": Remat(
        jax.checkpoint_policies.save_only_these_names(*kept.NAMES), again=True, kept=kept.NAMES
    ),
    "full": Remat(jax.checkpoint_policies.nothing_saveable, again=True),
}


def get(name: str) -> Remat:
    """The entry of `model.remat`.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in REMAT:
        raise ValueError(f"model.remat={name!r}: must be one of {list(REMAT)}")
    return REMAT[name]
