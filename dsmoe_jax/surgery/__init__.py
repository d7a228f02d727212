"""Surgery: changes to a trained model, `(config, parameters) -> (config, parameters)`.

A new operation is a function in a file here and a line in `OPERATIONS`: the command
`python -m dsmoe_jax surgery NAME` has it then, with its options as flags.  Operations touch no
files; workdirs.py reads the model and writes the new one.
"""

from __future__ import annotations

from dsmoe_jax.surgery import merging, placement, pruning, quantising, upcycling
from dsmoe_jax.surgery.types import Operation, Option, Outcome, Subject

OPERATIONS: dict[str, Operation] = {
    "upcycle": Operation(
        upcycling.upcycle,
        "Make a mixture of a dense model, its FFNs copied and cut.",
        upcycling.OPTIONS,
    ),
    "prune": Operation(
        pruning.prune,
        "Leave out experts that are like others, or that a text does not use.",
        pruning.OPTIONS,
    ),
    "merge": Operation(
        merging.merge,
        "Make one expert of several that are alike.",
        merging.OPTIONS,
    ),
    "extract": Operation(
        pruning.extract,
        "Keep the experts that a domain's text needs.",
        pruning.EXTRACTION_OPTIONS,
    ),
    "place": Operation(
        placement.place,
        "Order the experts so that devices get even loads.",
        placement.OPTIONS,
    ),
    "quantise": Operation(
        quantising.quantised,
        "Make whole numbers of 8 bits of the experts' weights.",
        quantising.OPTIONS,
        trainable=False,
    ),
}


__all__ = ["OPERATIONS", "Operation", "Option", "Outcome", "Subject"]
