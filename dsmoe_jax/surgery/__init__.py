"""Surgery: changes to a trained model, `(config, parameters) -> (config, parameters)`.

A new operation is a function in a file here and a line in `OPERATIONS`: the command
`python -m dsmoe_jax surgery NAME` has it then, with its options as flags.  Operations touch no
files; workdirs.py reads the model and writes the new one.
"""

from __future__ import annotations

from dsmoe_jax.surgery import placement
from dsmoe_jax.surgery.types import Operation, Option, Outcome, Subject

OPERATIONS: dict[str, Operation] = {
    "place": Operation(
        placement.place,
        "Order the experts so that devices get even loads.",
        placement.OPTIONS,
    ),
}


__all__ = ["OPERATIONS", "Operation", "Option", "Outcome", "Subject"]
