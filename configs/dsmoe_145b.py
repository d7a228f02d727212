"""DeepSeekMoE 145B: 4 shared and 128 routed experts, 12 activated, first layer dense (V1 7.1).

    python -m dsmoe_jax train --config=configs/dsmoe_145b.py:demo --workdir=DIR

The widths are 1408 (an eighth is 1365.33) and 21888; the paper's FLOPs are at these.  Beside the
expert balance loss there is a device balance loss over 4 groups of experts.

V1 table 6, 245B tokens: loss 1.876, 144.6B parameters, 22.2B activated, 585.6T FLOPs per 4K tokens
(ours: 585.3T), 28.5 % of DeepSeek 67B's.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict

SETUP = base.Setup(
    "dsmoe_145b", base.PAPER_145B, shared=4, routed=128, top_k=12, width=1 / 8,
    balance=FrozenDict(expert=0.003, device=0.05), expert_groups=4, dense_layers=1,
    dense_width=2.0, released_width=1408,
    released_dense_width=21888, flops_at_released_width=True,
)  # fmt: skip


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
