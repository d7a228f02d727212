"""Dense with 4 standard FFNs a layer, all active: four shared experts (V1 table 9).

    python -m dsmoe_jax train --config=configs/dense_2b_x4.py:demo --workdir=DIR

V1, 100B tokens: Pile loss 1.908 with 0.47B expert parameters.
"""

import dataclasses

from configs import base, dense_2b

SETUP = dataclasses.replace(dense_2b.SETUP, name="dense_2b_x4", n_shared_experts=4)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
