"""DeepSeek-V2-Lite: latent attention, 2 shared and 64 routed experts, 6 activated (V2 appendix B).

    python -m dsmoe_jax train --config=configs/deepseek_v2_lite.py:demo --workdir=DIR

As released: YaRN for 128K positions, which pre-training at 4096 does not need; without it
`--config.model.attention.rope_scaling=None`.

Training as in appendix B and the model card: the expert-level term alone, and at "paper" 4.2e-4,
x 0.316 at 80 and at 90 % of the steps, 4608 sequences throughout.  Not from there: that the term
counts within a sequence, as in the released models.

V2, appendix B: 15.7B parameters, 2.4B activated without the embedding.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.planning import papers

YARN = {
    "model.attention.rope_scaling.rope_type": "yarn",
    "model.attention.rope_scaling.factor": 40.0,
    "model.attention.rope_scaling.original_max_position_embeddings": 4096,
    "model.attention.rope_scaling.mscale": 0.707,
    "model.attention.rope_scaling.mscale_all_dim": 0.707,
}
SETUP = base.Setup(
    "deepseek_v2_lite",
    papers.V2["deepseek_v2_lite"].settings,
    n_shared_experts=2,
    n_routed_experts=64,
    num_experts_per_tok=6,
    nominal_width=1 / 4,
    balance=FrozenDict(expert=0.001),
    first_k_dense_replace=1,
    nominal_dense_width=2.0,
    moe_intermediate_size=1408,
    intermediate_size=10944,
    queries=0,
    released=FrozenDict(YARN),
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
