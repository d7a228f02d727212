"""Qwen3-30B-A3B: 128 experts, 8 activated, none shared; queries and keys are normed (2505.09388).

    python -m dsmoe_jax train --config=configs/qwen3_30b_a3b.py:demo --workdir=DIR

The balance term counts load over the global batch.

Model card: 30.5B parameters, 3.3B activated.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "qwen3_30b_a3b",
    papers.RELEASED["qwen3_30b_a3b"].settings,
    n_shared_experts=0,
    n_routed_experts=128,
    num_experts_per_tok=8,
    nominal_width=1 / 8,
    balance=FrozenDict(expert=0.001),
    moe_intermediate_size=768,
    flops_at_released_width=True,
    changes=FrozenDict(
        {
            "model.moe.router.norm_topk_prob": True,
            "model.moe.balance.expert.scope": "global_batch",
            "model.attention.options.qk_norm": "head",
        }
    ),
    released=FrozenDict({"model.attention.rope_theta": 1e6}),
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
