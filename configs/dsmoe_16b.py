"""DeepSeekMoE 16B: 2 shared and 64 routed experts, 6 activated, first layer dense (V1 5.1).

    python -m dsmoe_jax train --config=configs/dsmoe_16b.py:demo --workdir=DIR

The released widths are 1408 for an expert (a quarter is 1365.33) and 10944 for the dense layer;
the paper's FLOPs are at the nominal quarter and double width.

V1 table 3: 16.4B parameters, 2.8B activated, 74.4T FLOPs per 4K tokens, 40.5 % of DeepSeek 7B's.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "dsmoe_16b",
    papers.V1["dsmoe_16b"].settings,
    n_shared_experts=2,
    n_routed_experts=64,
    num_experts_per_tok=6,
    nominal_width=1 / 4,
    balance=FrozenDict(expert=0.001),
    first_k_dense_replace=1,
    nominal_dense_width=2.0,
    moe_intermediate_size=1408,
    intermediate_size=10944,
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
