"""GShard 137B: 16 routed experts of standard width, 2 activated, first layer dense (V1 7.2).

    python -m dsmoe_jax train --config=configs/gshard_137b.py:demo --workdir=DIR

An expert is 10944 wide (nominal 10922.67); the paper's FLOPs are at the nominal width.

V1 table 6, 245B tokens: loss 1.961, 136.5B parameters, 21.6B activated, 572.7T FLOPs per 4K tokens.
"""

import dataclasses

from configs import base, dsmoe_145b
from dsmoe_jax.config.frozen import FrozenDict

SETUP = dataclasses.replace(
    dsmoe_145b.SETUP,
    name="gshard_137b",
    n_shared_experts=0,
    n_routed_experts=16,
    num_experts_per_tok=2,
    nominal_width=1.0,
    balance=FrozenDict(expert=0.003),
    expert_groups=1,
    moe_intermediate_size=10944,
    flops_at_released_width=False,
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
