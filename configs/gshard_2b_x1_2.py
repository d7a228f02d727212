"""GShard with experts of 1.2 x the standard width (V1 table 8).

    python -m dsmoe_jax train --config=configs/gshard_2b_x1_2.py:demo --workdir=DIR

V1, 100B tokens: Pile loss 1.824 with 2.3B expert parameters, 0.28B activated.
"""

import dataclasses

from configs import base, gshard_2b

SETUP = dataclasses.replace(gshard_2b.SETUP, name="gshard_2b_x1_2", nominal_width=1.2)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
