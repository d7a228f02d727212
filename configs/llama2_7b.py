"""LLaMA2 7B, dense: the open model compared with DeepSeekMoE 16B (V1 table 4).

    python -m dsmoe_jax train --config=configs/llama2_7b.py:demo --workdir=DIR

Sizes only: the training settings are DeepSeek 7B's, so that the architectures compare.

V1: 6.7B parameters, 187.9T FLOPs per 4K tokens.
"""

import dataclasses

from configs import base, deepseek_7b
from dsmoe_jax.planning import papers

SETUP = dataclasses.replace(
    deepseek_7b.SETUP, name="llama2_7b", settings=papers.V1["llama2_7b"].settings
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
