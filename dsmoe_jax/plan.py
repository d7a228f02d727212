"""Proposes a mesh for a model on so many chips, and says what it costs; refuses what cannot fit.

python -m dsmoe_jax.plan --config=configs/dsmoe_16b.py --chip=v5p --chips=64
python -m dsmoe_jax.plan --config=configs/dsmoe_145b.py --chip=h100 --chips=512 --json

It is arithmetic and takes seconds; activations are an estimate.  What the compiler really
allocates, `python -m dsmoe_jax.aot` says.
"""

from __future__ import annotations

import dataclasses
import json

from absl import flags

from dsmoe_jax import cli
from dsmoe_jax.parallel.planner import HBM_GB, describe, propose

cli.define_config()
_CHIP = flags.DEFINE_string("chip", None, f"One of {', '.join(HBM_GB)}.")
_CHIPS = flags.DEFINE_integer("chips", None, "How many.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text.")


def main() -> None:
    """Runs the command."""
    config, chip, chips = cli.config(), _CHIP.value, _CHIPS.value
    if chip is None or chips is None:
        missing = "chip" if chip is None else "chips"
        raise ValueError(f"--{missing}: missing; for example --chip=v5p --chips=64")
    plan, plans = propose(config, chip, chips)
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(plan)))
    else:
        print(describe(config, plan, plans, chip))


if __name__ == "__main__":
    cli.run(main)
