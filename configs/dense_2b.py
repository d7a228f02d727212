"""The dense model of V1 table 1: one FFN of standard width a layer, written as one shared expert.

    python -m dsmoe_jax train --config=configs/dense_2b.py:demo --workdir=DIR

It is named for the comparison of 2B models; it has 0.2B parameters itself.

V1 table 1, 100B tokens: Pile loss 2.060 with 0.2B parameters, 2.9T FLOPs per 2K tokens.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "dense_2b",
    papers.V1["dense_2b"].settings,
    n_shared_experts=1,
    n_routed_experts=0,
    num_experts_per_tok=0,
    nominal_width=1.0,
    balance=FrozenDict(),
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
