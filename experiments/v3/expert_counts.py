"""More and more routed experts at the same activated size, up to where they stop helping.

    python -m experiments.v3.expert_counts --scale=demo

Each token activates one shared and seven routed experts of a quarter of a standard FFN, as in
DeepSeekMoE 2B; only how many there are to choose from differs: with the shared one 8 (all of them
activated, as in a dense model), 16, 32, ... 512.  So the expert parameters double from arm to arm,
and the FLOPs are equal but for the router, which has one row an expert.  64 is DeepSeekMoE 2B.
"""

import dataclasses

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import decreasing, larger_change, ratio_below
from dsmoe_jax.study.experiment import Arm, Equal, Experiment
from experiments.laws import sizes

TOTALS = (8, 16, 32, 64, 128, 256, 512)
ARMS = tuple(
    Arm(f"1 + {total - 1}", "dsmoe_2b", overrides={"model.moe.n_routed_experts": total - 1})
    for total in TOTALS
)
LABELS = tuple(arm.label for arm in ARMS)

EXPERIMENT = Experiment(
    module="experiments.v3.expert_counts",
    title="More experts to choose from",
    source="Switch Transformers (arXiv 2101.03961), figure 4; 2202.01169, section 5",
    summary="More experts lower the loss at the same work for each token, each doubling by less"
    " than the one before. (Arms read: shared + routed experts.)",
    arms=ARMS,
    # Not `same_activated`: the router of 512 experts is no longer small in a small model.
    equal=(
        Equal("expert_activated", LABELS, 0.0),
        Equal("flops_per_sequence", LABELS, 0.0),
    ),
    claims=(
        *decreasing(*LABELS[:-1], source="2101.03961 figure 4"),  # up to 256 experts
        larger_change(
            f"the step from {LABELS[-2]} to {LABELS[-1]} helps less than that from {LABELS[0]} to"
            f" {LABELS[1]}",
            (LABELS[1], LABELS[0]),
            (LABELS[-1], LABELS[-2]),
            source="2202.01169 section 5",
        ),
        # Little beyond 256: twice as many are not better by more than 0.5 %.
        dataclasses.replace(
            ratio_below(LABELS[-2], LABELS[-1], 1.005, source="2202.01169 section 5"),
            text=f"{LABELS[-2]} at most 0.5 % above {LABELS[-1]}",
        ),
    ),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
