"""DeepSeek 7B, dense: compared with DeepSeekMoE 16B (V1 table 3).

    python -m dsmoe_jax train --config=configs/deepseek_7b.py:demo --workdir=DIR

The FFN is 11008 wide (nominal 10922.67); the paper's FLOPs are at the nominal width.  It is twice
as wide as the 16B at every scale.

V1 table 3: 6.9B parameters, 183.5T FLOPs per 4K tokens.
"""

import dataclasses

from configs import base, dense_2b
from dsmoe_jax.planning import papers

SETUP = dataclasses.replace(
    dense_2b.SETUP,
    name="deepseek_7b",
    settings=papers.V1["deepseek_7b"].settings,
    moe_intermediate_size=11008,
    beside=papers.V1_16B,
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
