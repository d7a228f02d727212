"""DeepSeek 67B, dense with grouped-query attention: compared with the 145B (V1 table 6).

    python -m dsmoe_jax train --config=configs/deepseek_67b.py:demo --workdir=DIR

The FFN is 22016 wide (nominal 21845.33) and 64 heads share 8 key/value heads; the paper's FLOPs
are at the nominal width and take full multi-head attention.  It is twice as wide as the 145B and
half as deep again at every scale.

V1 table 6, 245B tokens: loss 1.905, 67.4B parameters, 2057.5T FLOPs per 4K tokens.
"""

import dataclasses

from configs import base, deepseek_7b
from dsmoe_jax.planning import papers

SETUP = dataclasses.replace(
    deepseek_7b.SETUP,
    name="deepseek_67b",
    settings=papers.V1["deepseek_67b"].settings,
    moe_intermediate_size=22016,
    beside=papers.V1_145B,
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
