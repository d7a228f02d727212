"""Switch Transformer 2B: 16 routed experts of standard width, the best one activated (2101.03961).

    python -m dsmoe_jax train --config=configs/switch_2b.py:demo --workdir=DIR

V1 table 1, 100B tokens: Pile loss 1.881 with 2.0B parameters, 0.2B activated, 2.9T FLOPs per 2K
tokens.
"""

import dataclasses

from configs import base, gshard_2b

SETUP = dataclasses.replace(
    gshard_2b.SETUP, name="switch_2b", num_experts_per_tok=1, router="switch"
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
