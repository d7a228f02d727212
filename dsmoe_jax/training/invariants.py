"""Invariants of every step, whatever is trained: checked with its metrics, which costs nothing.

- Every assignment that a router sent was computed or is in the drop ledger (moe/dropping.py).
- The balance bias of every router moved whose load was uneven: one that stays is a router without
  balance, and no loss shows it.
"""

from __future__ import annotations

import jax

from dsmoe_jax.runs.summaries import missing_assignments
from dsmoe_jax.training.step import StepMetrics


class Violated(ValueError):
    """A step did not do what every step must do."""


def violation(metrics: StepMetrics) -> str | None:
    """The invariant that a step breaks, in words; None if it keeps all.

    Args:
      metrics: fetched from the device.
    """
    if metrics.router is not None:
        missing = missing_assignments(metrics.router.ledger)
        if missing is not None:
            return missing
    if metrics.biases is not None:
        moved, due = (int(n) for n in jax.device_get(metrics.biases))
        if moved != due:
            return (
                f"the balance bias of {moved} routers moved, and the load of {due} was uneven"
                " (model.moe.router.bias_update_speed): the others have no balance"
            )
    return None
