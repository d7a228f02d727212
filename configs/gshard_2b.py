"""GShard 2B: 16 routed experts of standard width, 2 activated, none shared (V1 4.1; 2006.16668).

    python -m dsmoe_jax train --config=configs/gshard_2b.py:demo --workdir=DIR

The gates are the softmax affinities, not renormalised over the two chosen experts, as in V1's
conventional MoE (eqs. 3-5) and unlike the original GShard.  It is also the first step of V1
figure 3.  Options: `width_percent` and `steps_percent`, as in dsmoe_2b.

V1 table 1, 100B tokens: Pile loss 1.867 with 2.0B parameters, 0.3B activated, 4.3T FLOPs per 2K
tokens.
"""

import dataclasses

from configs import base, dsmoe_2b

SETUP = dataclasses.replace(dsmoe_2b.setup(split=1, shared=0), name="gshard_2b")


def get_config(arg: str = "paper"):
    scale, options = base.parse(arg, width_percent=100, steps_percent=100)
    name = SETUP.name + dsmoe_2b.resized_name(**options)
    return base.build(dataclasses.replace(SETUP, name=name, **options), scale)
