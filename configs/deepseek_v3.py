"""DeepSeek-V3: latent attention, 1 shared and 256 routed experts, 8 activated, one MTP module.

    python -m dsmoe_jax train --config=configs/deepseek_v3.py:demo --workdir=DIR

Sigmoid scores with the loss-free bias, 4 of 8 nodes, a sequence-wise term (section 2.1.2), and
multi-token prediction (2.2), whose module is not in the figures.  YaRN as released; without it
`--config.model.attention.rope_scaling=None`.

Training as in section 4.2: balance factor, speed of the bias and weight of the module by shares of
the steps, and at "paper" a rate of 2.2e-4, from 10 of 14.8T tokens on a cosine down to a tenth.
Left out: the last drop, to 7.3e-6 for 167B tokens, and the growing batch (planning/papers.py),
whose steps are printed nowhere.

V3, abstract: 671B parameters, 37B activated.
"""

from configs import base, deepseek_v2_lite
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

SETUP = base.Setup(
    "deepseek_v3",
    papers.V3["deepseek_v3"].settings,
    n_shared_experts=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    nominal_width=1 / 8,
    balance=FrozenDict(sequence=1e-4),
    first_k_dense_replace=3,
    nominal_dense_width=1.0,
    moe_intermediate_size=2048,
    intermediate_size=18432,
    flops_at_released_width=True,
    queries=12,
    changes=FrozenDict(
        {
            "model.moe.router.scoring_func": "sigmoid",
            "model.moe.router.norm_topk_prob": True,
            "model.moe.router.routed_scaling_factor": 2.5,
            "model.moe.router.n_group": 8,
            "model.moe.router.topk_group": 4,
            "model.moe.router.group_score": "top2_sum",
            # Section 4.2: gamma is 0 for the last 0.5 of 14.8T tokens, lambda falls after 10T.
            "model.moe.router.bias_update_speed": 0.001,
            "model.moe.router.bias_update_schedule": ((0.966, 1.0), (0.966, 0.0)),
            "model.mtp.num_nextn_predict_layers": 1,
            "model.mtp.factor": 0.3,
            "model.mtp.schedule": ((0.676, 1.0), (0.676, 1 / 3)),
        }
    ),
    released=FrozenDict(
        deepseek_v2_lite.YARN
        | {
            "optimizer.schedule": "cosine",
            "optimizer.decay_factor": 0.1,
            "model.moe.dispatch.chunks": 2,  # 512 v5p: 78 GB of a chip instead of 96, which has 95
            "model.attention.rope_scaling.mscale": 1.0,
            "model.attention.rope_scaling.mscale_all_dim": 1.0,
        }
    ),
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
