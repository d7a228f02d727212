"""Dense with 16 standard FFNs a layer, all active: V1's bound for MoE models (V1 table 2).

    python -m dsmoe_jax train --config=configs/dense_2b_x16.py:demo --workdir=DIR

V1, 100B tokens: Pile loss 1.806 with 1.89B expert parameters, 24.6T FLOPs per 2K tokens.
"""

import dataclasses

from configs import base, dense_2b

SETUP = dataclasses.replace(dense_2b.SETUP, name="dense_2b_x16", n_shared_experts=16)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
