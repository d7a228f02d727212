"""DeepSeekMoE 2B in three stages: more activated experts, smaller batches and a lower rate in each.

    python -m dsmoe_jax train --config=configs/dsmoe_2b_staged.py:demo --workdir=DIR

Tokens and activated experts (the mean over all tokens) are those of `dsmoe_2b`, in another order:
5, then 8, then 14 of the 63 routed experts, in batches of twice, once and half its size, at once, a
third and a sixth of its peak rate, for 30, 50 and 20 % of the steps.  No paper has this recipe; it
is advice of a blog (4M, 2M, 1M tokens a batch; 3e-4, 1e-4, 5e-5), which
experiments/recipe/stages.py tests.  Any key that can change during a run can have such a column of
`train.stages`, here or on the command line.
"""

from configs import dsmoe_2b
from dsmoe_jax.config import from_config_dict, replace, to_config_dict

SHARES = (0.3, 0.5, 0.2)  # of the steps
BATCHES = (2, 1, 0.5)  # times that of dsmoe_2b
RATES = (1, 1 / 3, 1 / 6)  # times its peak
EXPERTS = (5, 8, 14)  # by tokens, which are SHARES x BATCHES, they are 7 in the mean


def get_config(arg: str = "paper"):
    config = from_config_dict(dsmoe_2b.get_config(arg))
    batch = config.train.global_batch_size
    peak = config.optimizer.peak_learning_rate
    held_out = config.train.eval_batches
    mean_batch = sum(share * times for share, times in zip(SHARES, BATCHES, strict=True))
    stages = {
        "name": "dsmoe_2b_staged",
        "train.steps": round(config.train.steps / mean_batch),
        "optimizer.schedule": "constant",  # within a stage, after the warm-up
        "train.stages.share": SHARES,
        "train.stages.train.global_batch_size": tuple(round(batch * x) for x in BATCHES),
        # The same held-out text in all stages; None is all there is.
        "train.stages.train.eval_batches": tuple(
            None if held_out is None else round(held_out / x) for x in BATCHES
        ),
        "train.stages.optimizer.peak_learning_rate": tuple(peak * x for x in RATES),
        "train.stages.model.moe.num_experts_per_tok": EXPERTS,
    }
    return to_config_dict(replace(config, **stages))
