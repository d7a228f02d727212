"""DeepSeekMoE 2B in three stages, with more activated experts and smaller batches in each.

    python -m dsmoe_jax train --config=configs/dsmoe_2b_staged.py:demo --workdir=DIR

An example of `train.stages`, not a recipe of a paper: 3, then 7, then 15 of the 63 routed experts
are activated, and batches are of twice, once and half the size of `dsmoe_2b`, all on one stream of
data.  Any key that can change during a run can have such a column, here or on the command line.
"""

from configs import dsmoe_2b
from dsmoe_jax.config import from_config_dict, replace, to_config_dict

SHARES = (0.3, 0.5, 0.2)  # of the steps


def get_config(arg: str = "paper"):
    config = from_config_dict(dsmoe_2b.get_config(arg))
    batch = config.train.global_batch_size
    stages = {
        "name": "dsmoe_2b_staged",
        "train.stages.share": SHARES,
        "train.stages.train.global_batch_size": (2 * batch, batch, batch // 2),
        "train.stages.model.moe.num_experts_per_tok": (3, 7, 15),
    }
    return to_config_dict(replace(config, **stages))
