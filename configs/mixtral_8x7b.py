"""Mixtral 8x7B: 8 experts of 1.3 standard FFNs, 2 activated, gates over the chosen (2401.04088).

    python -m dsmoe_jax train --config=configs/mixtral_8x7b.py:demo --workdir=DIR

How it was trained is not published: the balance term has the released config's factor.

2401.04088: 46.7B parameters, 12.9B activated.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "mixtral_8x7b",
    papers.RELEASED["mixtral_8x7b"].settings,
    n_shared_experts=0,
    n_routed_experts=8,
    num_experts_per_tok=2,
    nominal_width=21 / 16,
    balance=FrozenDict(expert=0.02),
    moe_intermediate_size=14336,
    changes=FrozenDict({"model.moe.router.norm_topk_prob": True}),
    released=FrozenDict({"model.attention.rope_theta": 1e6, "model.rms_norm_eps": 1e-5}),
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
