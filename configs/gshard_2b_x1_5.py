"""GShard with experts of 1.5 x the standard width, as good as DeepSeekMoE 2B (V1 table 2).

    python -m dsmoe_jax train --config=configs/gshard_2b_x1_5.py:demo --workdir=DIR

V1, 100B tokens: Pile loss 1.808 with 2.83B expert parameters, 0.35B activated, 5.8T FLOPs per 2K
tokens.
"""

import dataclasses

from configs import base, gshard_2b

SETUP = dataclasses.replace(gshard_2b.SETUP, name="gshard_2b_x1_5", nominal_width=1.5)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
