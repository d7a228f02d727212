"""Loss against experts left: the most alike ones merged, beside those least used pruned.

    python -m experiments.v1.fig3 --scale=demo              # these train the models
    python -m experiments.v1.table2 --scale=demo
    python -m experiments.surgery.merging --scale=demo      # merges their experts

Alike in weights, after the best matching of hidden units, or in outputs on training text.  A merged
expert is the mean of its experts by use, its router row too; as many are activated as before.  The
loss is that of the run's held-out text; nothing is trained afterwards.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study import fewer_experts
from dsmoe_jax.study.claims import Claim, below, bounded
from dsmoe_jax.study.experiment import Experiment
from experiments.surgery._models import GSHARD, LARGER, OURS, SHARES, arms, label, panels

WEIGHTS, OUTPUTS, PRUNED = "merged by weights", "merged by outputs", "pruned by use"
RISE = "rise"


def cheap(model: str) -> tuple[Claim, ...]:
    """Claims that merging to each share costs less than 1 % of the loss."""
    return tuple(
        bounded(
            label(model, WEIGHTS, share),
            below=1,
            measure="rise_percent",
            source="slides on mixtures",
        )
        for share in SHARES
    )


def better_than_pruned(model: str) -> tuple[Claim, ...]:
    """Claims that merging to a share costs less than pruning to it."""
    return tuple(
        below(
            label(model, WEIGHTS, share),
            label(model, PRUNED, share),
            measure=RISE,
            source="2310.01334",
        )
        for share in SHARES
    )


EXPERIMENT = Experiment(
    module="experiments.surgery.merging",
    title="Loss against experts left: merging",
    source="slides on mixtures of experts; M-SMoE (2310.01334); DeepSeekMoE (arXiv 2401.06066)",
    summary="Merging experts is said to save parameters without much loss; that is read as less"
    " than 1 %. It is said to be better than pruning, where the model is trained afterwards. If"
    " DeepSeekMoE's experts are less redundant than those of the GShard of its loss, it should lose"
    " more. The experts most alike in weights (hidden units matched) or in outputs become one, the"
    " mean by use; here nothing is trained afterwards. (Labels end in the share of all experts that"
    " is left, with DeepSeekMoE's shared one.)",
    arms=(
        *arms(WEIGHTS, fewer_experts.merged, "aligned"),
        *arms(OUTPUTS, fewer_experts.merged, "outputs"),
        *arms(PRUNED, fewer_experts.pruned, "use"),
    ),
    claims=(
        *(claim for model in (GSHARD, LARGER, OURS) for claim in cheap(model)),
        *(claim for model in (GSHARD, LARGER, OURS) for claim in better_than_pruned(model)),
        *(
            below(
                label(LARGER, WEIGHTS, share),
                label(OURS, WEIGHTS, share),
                measure=RISE,
                source="V1 section 4.5",
            )
            for share in SHARES
        ),
    ),
    measures=(RISE, "rise_percent", "validation_loss", "experts_left", "parameters_left"),
    pictures=("panels_over_x",),
    x_axis="share of all experts that is left",
    panels=panels({way: "" for way in (WEIGHTS, OUTPUTS, PRUNED)}),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
