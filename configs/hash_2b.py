"""Hash layer 2B: 16 experts of standard width, one per token by a fixed table (2106.04426).

    python -m dsmoe_jax train --config=configs/hash_2b.py:demo --workdir=DIR

Routing is not learned, so there is no balance term.

V1 table 1, 100B tokens: Pile loss 1.932 with 2.0B parameters, 0.2B activated, 2.9T FLOPs per 2K
tokens.
"""

import dataclasses

from configs import base, switch_2b
from dsmoe_jax.config.frozen import FrozenDict

SETUP = dataclasses.replace(switch_2b.SETUP, name="hash_2b", router="hash", balance=FrozenDict())


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
