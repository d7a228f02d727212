"""Names of values that rematerialisation may keep, so that the backward pass need not compute them.

They cost much to compute again for each byte: an exchange between devices, scores of all positions.
`model.remat` decides (dsmoe_jax/model/remat.py).
"""

from __future__ import annotations

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENDED = "attended"  # what splash attention returns, with the sums that its gradient needs
RECEIVED = "received"  # rows of tokens, with their labels, that came from other devices
NAMES = (ATTENDED, RECEIVED)

Values = TypeVar("Values")


def named(name: str, values: Values) -> Values:
    """The same values, under a name of `NAMES`."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), values)
