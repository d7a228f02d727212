"""DeepSeekMoE 16B: 2 shared and 64 routed experts, 6 activated, first layer dense (V1 5.1).

    python -m dsmoe_jax train --config=configs/dsmoe_16b.py:demo --workdir=DIR

The released widths are 1408 for an expert (a quarter is 1365.33) and 10944 for the dense layer;
the paper's FLOPs are at the nominal quarter and double width.

V1 table 3: 16.4B parameters, 2.8B activated, 74.4T FLOPs per 4K tokens, 40.5 % of DeepSeek 7B's.
"""

from configs import base
from dsmoe_jax.config.frozen import FrozenDict

SETUP = base.Setup(
    "dsmoe_16b", base.PAPER_16B, shared=2, routed=64, top_k=6, width=1 / 4,
    balance=FrozenDict(expert=0.001),
    dense_layers=1, dense_width=2.0, released_width=1408, released_dense_width=10944,
)  # fmt: skip


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
