"""Surgery: changes to a trained model, `(config, parameters) -> (config, parameters)`.

A new operation is a function in a file here and a line in `OPERATIONS`: the command
`python -m dsmoe_jax surgery NAME` has it then, with its options as flags.  Operations touch no
files; workdirs.py reads the model and writes the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsmoe_jax.surgery import merging, one_task, placement, pruning, quantising, upcycling
from dsmoe_jax.surgery.types import Operation, Option, Outcome, Subject

OPERATIONS: dict[str, Operation] = {
    "upcycle": Operation(
        upcycling.upcycle,
        "Make a mixture of a dense model, its FFNs copied and cut.",
        upcycling.OPTIONS,
    ),
    "prune": Operation(
        pruning.prune,
        "Leave out experts that are like others, or that a text hardly misses.",
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
    "extract_task": Operation(
        one_task.extract_task,
        "Make a dense model of the experts that a router by task gives one.",
        one_task.OPTIONS,
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


def complete(operation: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of an operation: those that are given, the others at their defaults.

    Raises:
      ValueError: for an operation that there is not, an option that is not its own, or one that is
        missing.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r}: must be one of {', '.join(OPERATIONS)}")
    own = OPERATIONS[operation].options
    for name, value in given.items():
        if name not in own:
            raise ValueError(f"--{name}={value}: has no meaning for {operation}")
    for name, option in own.items():
        if option.needed and name not in given:
            raise ValueError(f"--{name}: missing; {option.help}")
    return {name: given.get(name, option.default) for name, option in own.items()}


__all__ = ["OPERATIONS", "Operation", "Option", "Outcome", "Subject", "complete"]
