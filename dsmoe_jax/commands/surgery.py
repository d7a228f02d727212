r"""Changes a trained model: a new workdir from another one, by one operation.

python -m dsmoe_jax surgery place --from=runs/dsmoe --to=runs/placed --devices=8 \
    --loads=routing/validation-00000400

The word behind `surgery` is the operation; the flags below say to which operations they belong.

`place` orders the experts of every layer by recorded loads: the devices of a mesh, which get equal
parts of them in their order, then have about the same to do.  The model computes the same: router
rows, biases, tables and expert weights move together.  Groups of group-limited routing stay whole.
Every second batch decides, the others judge.  `evaluate --record_routing` records loads.

`upcycle` makes a mixture of a dense model: its FFNs copied, cut into parts, some of them shared.
With normalised gates and one router row for all parts of a copy the function stays the same.

`prune` leaves out experts that are like others (in weights or outputs), that a text does not use,
or without which the loss rises least.  `merge` makes one expert of several that are alike.
`extract` keeps the experts that a domain's text needs, by its assignments or its gates.  All layers
keep equally many.  docs/surgery.md says when a model stays the same.

`extract_task` makes a dense model of the experts that a task has, of a model whose router chooses
by task: on text of the task it computes the same.

`quantise` makes whole numbers of 8 bits of the experts' weights, with a scale for each output: a
quarter of their bytes.  `evaluate`, `generate` and `analyse` take the model; it is not trained.

The new workdir has one checkpoint, of the same step: `evaluate`, `generate`, `analyse` and
`convert` take it, and `train` with the same config goes on with it.  Its surgery.json has all
operations that made the model, with their numbers.

--moments says what becomes of the optimizer's: carried (changed as the parameters are), fresh (0,
with the learning rate where it was) or none (a model alone, to begin with by train.start_from).

Nothing that exists is overwritten, and nothing is left half-written.
"""

from __future__ import annotations

from typing import Any

import jax
from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.runs import json_files
from dsmoe_jax.surgery import OPERATIONS, Option, complete
from dsmoe_jax.surgery.workdirs import MOMENTS, operate

command_line.define_mesh()
command_line.define_words({name: entry.purpose for name, entry in OPERATIONS.items()})
_FROM = flags.DEFINE_string("from", None, "Workdir of a trained model.")
_TO = flags.DEFINE_string("to", None, "New workdir.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of --from; the newest if not given.")
_MOMENTS = flags.DEFINE_enum(
    "moments", None, [*MOMENTS], "The optimizer's; carried if not given, none for quantise."
)
_JSON = flags.DEFINE_bool("json", False, "Print the report as JSON.")
_DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    str: flags.DEFINE_string,
}


def _options() -> dict[str, dict[Option, list[str]]]:
    """Every option by name, in the forms that operations have it in."""
    found: dict[str, dict[Option, list[str]]] = {}
    for operation, entry in OPERATIONS.items():
        for name, option in entry.options.items():
            found.setdefault(name, {}).setdefault(option, []).append(operation)
    return found


def _define(name: str, forms: dict[Option, list[str]]) -> flags.FlagHolder[Any]:
    """The flag of an option."""
    (kind,) = {option.kind for option in forms}
    texts = [f"{', '.join(operations)}: {option.help}" for option, operations in forms.items()]
    return _DEFINE[kind](name, None, "  ".join(texts))


_FLAGS = {name: _define(name, forms) for name, forms in _options().items()}


def main() -> None:
    """Runs the command."""
    name = command_line.word()
    if _FROM.value is None or _TO.value is None:
        raise ValueError("--from, --to: both are needed, for example --to=runs/placed")
    given = {option: flag.value for option, flag in _FLAGS.items() if flag.value is not None}
    options = complete(name, given)
    with jax.set_mesh(command_line.mesh()):
        made = operate(
            name, _FROM.value, _TO.value, options, step=_STEP.value, moments=_MOMENTS.value
        )
    if _JSON.value:
        print(json_files.dumps({"workdir": str(made.place), **made.outcome.report}))
    else:
        print(f"{made.outcome.text}\n{made.place}: step {made.step}")
