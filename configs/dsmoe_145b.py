"""DeepSeekMoE 145B: 4 shared and 128 routed experts, 12 activated, first layer dense (V1 7.1).

    python -m dsmoe_jax train --config=configs/dsmoe_145b.py:demo --workdir=DIR

The widths are 1408 (an eighth is 1365.33) and 21888; the paper's FLOPs are at these.  Beside the
expert balance loss there is a device balance loss over 4 groups of experts.

V1 table 6, 245B tokens: loss 1.876, 144.6B parameters, 22.2B activated, 585.6T FLOPs per 4K tokens
(ours: 585.3T), 28.5 % of DeepSeek 67B's.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "dsmoe_145b",
    papers.V1["dsmoe_145b"].settings,
    n_shared_experts=4,
    n_routed_experts=128,
    num_experts_per_tok=12,
    nominal_width=1 / 8,
    balance=FrozenDict(expert=0.003, device=0.05),
    expert_groups=4,
    first_k_dense_replace=1,
    nominal_dense_width=2.0,
    moe_intermediate_size=1408,
    intermediate_size=21888,
    flops_at_released_width=True,
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
