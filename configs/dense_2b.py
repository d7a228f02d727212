"""The dense model of V1 table 1: one FFN of standard width a layer, written as one shared expert.

    python -m dsmoe_jax train --config=configs/dense_2b.py:demo --workdir=DIR

It belongs to the 2B comparison and has 0.2B parameters itself.

V1 table 1, 100B tokens: Pile loss 2.060 with 0.2B parameters, 2.9T FLOPs per 2K tokens.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict

SETUP = base.Setup(
    "dense_2b", base.PAPER_2B, shared=1, routed=0, top_k=0, width=1.0, balance=FrozenDict()
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
