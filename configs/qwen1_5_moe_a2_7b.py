"""Qwen1.5-MoE-A2.7B: 60 routed experts, 4 activated, beside 4 shared ones with a gate.

    python -m dsmoe_jax train --config=configs/qwen1_5_moe_a2_7b.py:demo --workdir=DIR

The released model has its shared experts as one FFN of 5632, four times an expert.

Model card: 14.3B parameters, 2.7B activated.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "qwen1_5_moe_a2_7b",
    papers.RELEASED["qwen1_5_moe_a2_7b"].settings,
    n_shared_experts=4,
    n_routed_experts=60,
    num_experts_per_tok=4,
    nominal_width=1 / 4,
    balance=FrozenDict(expert=0.001),
    moe_intermediate_size=1408,
    changes=FrozenDict(
        {"model.moe.shared_expert_gate": True, "model.attention.options.bias": True}
    ),
    released=FrozenDict({"model.attention.rope_theta": 1e6}),
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
