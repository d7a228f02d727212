"""DeepSeek-V2: latent attention, 2 shared and 160 routed experts, 6 activated on 3 of 8 devices.

    python -m dsmoe_jax train --config=configs/deepseek_v2.py:demo --workdir=DIR

The choice is limited to devices (section 2.2.2), balanced on three levels (2.2.3), and in training
each device drops what is above its share (2.2.4).  YaRN as in V2-Lite.

Training as in section 3.1.2: a1, a2, a3 of the three balance terms, capacity 1 with a tenth of the
sequences protected, and at "paper" 2.4e-4, x 0.316 at 60 and at 90 % of the steps.  Left out is the
growing batch (planning/papers.py), whose steps are printed nowhere.  V2 does not say over which
tokens the terms count; here it is the sequence, as in the released models.

V2, abstract: 236B parameters, 21B activated.
"""

from configs import base, deepseek_v2_lite
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "deepseek_v2",
    papers.V2["deepseek_v2"].settings,
    n_shared_experts=2,
    n_routed_experts=160,
    num_experts_per_tok=6,
    nominal_width=1 / 8,
    balance=FrozenDict(expert=0.003, device=0.05, communication=0.02),
    expert_groups=8,
    first_k_dense_replace=1,
    nominal_dense_width=1.0,
    moe_intermediate_size=1536,
    intermediate_size=12288,
    flops_at_released_width=True,
    queries=12,
    changes=FrozenDict(
        {
            "model.moe.router.n_group": 8,
            "model.moe.router.topk_group": 3,
            "model.moe.router.routed_scaling_factor": 16.0,
            "model.moe.drop.policy": "device",
            "model.moe.drop.capacity_factor": 1.0,
        }
    ),
    released=FrozenDict(deepseek_v2_lite.YARN),
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
