"""DeepSeekMoE 2B trained with half the activated experts: 1 shared + 3 of 63 routed (V1 4.5).

    python -m dsmoe_jax train --config=configs/dsmoe_2b_half.py:demo --workdir=DIR

V1 figure 6: with the same total expert parameters and half the activated ones it still has a
lower Pile loss than GShard.
"""

import dataclasses

from configs import base, dsmoe_2b

SETUP = dataclasses.replace(dsmoe_2b.setup(), name="dsmoe_2b_half", num_experts_per_tok=3)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
