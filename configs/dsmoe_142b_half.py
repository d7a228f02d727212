"""DeepSeekMoE 142B, half activated: 2 shared and 6 of 128 routed experts (V1 7.2).

    python -m dsmoe_jax train --config=configs/dsmoe_142b_half.py:demo --workdir=DIR

The dense first layer is half as wide as the 145B's, too.

V1 table 6, 245B tokens: loss 1.888, 142.3B parameters, 374.6T FLOPs per 4K tokens (ours: 142.4B,
374.5T), 18.2 % of DeepSeek 67B's.  Its 12.2B activated parameters do not follow from these sizes
(ours: 13.6B).
"""

import dataclasses

from configs import base, dsmoe_145b

SETUP = dataclasses.replace(
    dsmoe_145b.SETUP,
    name="dsmoe_142b_half",
    n_shared_experts=2,
    num_experts_per_tok=6,
    nominal_dense_width=1.0,
    intermediate_size=10944,
)


def get_config(arg: str = "paper"):
    return base.build(SETUP, arg)
