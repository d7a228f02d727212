"""Proposes a mesh for a model on a number of chips, with its costs; an error if none fits.

python -m dsmoe_jax plan --config=configs/dsmoe_16b.py --chip=v5p --chips=64
python -m dsmoe_jax plan --config=configs/dsmoe_145b.py --chip=h100 --chips=512 --json
python -m dsmoe_jax plan --config=configs/dsmoe_16b.py --chip=v5p --chips=64 \\
    --config.mesh.fsdp=8 --config.mesh.expert=8 --config.train.accumulation_steps=36

Of several slices (servers of GPUs) with the data-centre network between them say how many:

python -m dsmoe_jax plan --config=configs/dsmoe_16b.py --chip=v5p --chips=128 --config.mesh.slices=2

Then gradients are summed between slices over that network, and everything else stays inside of one.
If the config has a mesh, the costs are those of that mesh.  The arithmetic takes seconds;
activations are an estimate.  Of a run in stages it is the one whose steps have the most FLOPs.
`python -m dsmoe_jax aot` gives what the compiler allocates.
"""

from __future__ import annotations

import dataclasses
import json

from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.planning import planner
from dsmoe_jax.planning.plan_report import describe, stage_to_plan
from dsmoe_jax.training.teacher import teacher_model

command_line.define_config()
_CHIP = flags.DEFINE_string("chip", None, f"One of {', '.join(CHIPS)}.")
_CHIPS = flags.DEFINE_integer("chips", None, "How many.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text.")


def main() -> None:
    """Runs the command."""
    config, note = stage_to_plan(command_line.config())
    chip = _CHIP.value
    chips = _CHIPS.value
    if chip is None or chips is None:
        missing = "chip" if chip is None else "chips"
        raise ValueError(f"--{missing}: missing; for example --chip=v5p --chips=64")
    teacher = teacher_model(config)
    if not config.mesh.is_chosen:
        plan, plans = planner.propose(config, chip, chips, teacher)
    else:
        plan = planner.examine(config, chip, chips, teacher)
        plans = []
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(plan)))
    else:
        print(note + describe(config, plan, plans, chip))
