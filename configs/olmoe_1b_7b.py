"""OLMoE-1B-7B: 64 experts, 8 activated, none shared; queries and keys are normed (2409.02060).

    python -m dsmoe_jax train --config=configs/olmoe_1b_7b.py:demo --workdir=DIR

2409.02060: 6.9B parameters, 1.3B activated.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "olmoe_1b_7b",
    papers.RELEASED["olmoe_1b_7b"].settings,
    n_shared_experts=0,
    n_routed_experts=64,
    num_experts_per_tok=8,
    nominal_width=3 / 16,
    balance=FrozenDict(expert=0.01, router_z=0.001),
    moe_intermediate_size=1024,
    changes=FrozenDict({"model.attention.options.qk_norm": "all"}),
    released=FrozenDict({"model.rms_norm_eps": 1e-5}),
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
