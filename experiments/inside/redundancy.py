"""Are DeepSeekMoE's routed experts less redundant than GShard's?

    python -m experiments.v1.table2 --scale=demo              # these train the models
    python -m experiments.v1.fig3 --scale=demo
    python -m experiments.laws.granularity --scale=demo
    python -m experiments.inside.redundancy --scale=demo      # looks inside

V1 says so because masking each token's best experts hurts DeepSeekMoE more (figure 4).  That says
how much a token needs its own experts.  Redundant are experts that others could stand in for, so
the question is asked in three more ways: are the outputs and weights of two experts alike; how much
is lost when experts are gone for good, and every token takes its next best; and is there a
sixteenth that is hardly missed.  All on models as they were trained.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study import redundancy
from dsmoe_jax.study.claims import Claim, below, bounded
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.laws import granularity
from experiments.v1 import fig3, table2

GSHARD, LARGER, OURS = "GShard", "GShard x1.5", "DeepSeekMoE"
ISOLATED, FINE = "1 + 15 (1)", "0 + 64 (8)"


def look(label: str, trained_by: Experiment, trained: str) -> ProbeArm:
    """A model as it was trained, looked at inside."""
    return ProbeArm(label, trained_by, trained, probe=redundancy.redundancy)


def less_redundant(one: str, other: str, source: str) -> tuple[Claim, ...]:
    """Claims that the experts of a model are less redundant than those of another.

    They are less alike, and the loss rises more without them.
    """
    alike = ("outputs_alike", "outputs_cka", "weights_aligned")
    missed = ("masked_rise", "random_rise", "least_rise")
    return (
        *(below(one, other, measure=measure, source=source) for measure in alike),
        *(below(other, one, measure=measure, source=source) for measure in missed),
    )


EXPERIMENT = Experiment(
    module="experiments.inside.redundancy",
    title="How redundant are the routed experts?",
    source="DeepSeekMoE (arXiv 2401.06066), sections 3 and 4.5, figure 4",
    summary="DeepSeekMoE is said to have less redundant routed experts than GShard, since they are"
    " finer and a shared expert holds what they would have in common. Less redundant is read as:"
    " less alike in outputs and weights, and a higher loss without a sixteenth of them, be it each"
    " token's best, a random one, or the one that is missed least. Each is judged by itself. (Arms"
    " read: shared + routed experts, routed ones activated; GShard is 0 + 16 (2), DeepSeekMoE"
    " 1 + 63 (7).)",
    arms=(
        look(GSHARD, fig3.EXPERIMENT, "0 + 16 (2)"),
        look(LARGER, table2.EXPERIMENT, "GShard x1.5"),
        look(ISOLATED, fig3.EXPERIMENT, "1 + 15 (1)"),
        look(FINE, granularity.EXPERIMENT, "m = 4"),
        look(OURS, fig3.EXPERIMENT, "1 + 63 (7)"),
    ),
    claims=(
        # In the paper GShard x1.5 is the one of the same loss.
        *less_redundant(OURS, LARGER, "V1 section 4.5"),
        *less_redundant(OURS, GSHARD, "V1 section 3"),
        # What isolating one expert brings, of 16 and of 64.
        *less_redundant(ISOLATED, GSHARD, "V1 section 3.2"),
        *less_redundant(OURS, FINE, "V1 section 3.2"),
        # "Only 38 % are clearly distinct" is read as fewer than half.
        bounded(OURS, below=50, measure="distinct_experts", source="a blog on V1"),
    ),
    measures=(
        "outputs_alike",
        "outputs_cka",
        "weights_aligned",
        "distinct_experts",
        "masked_rise",
        "random_rise",
        "least_rise",
        "sixteenth_rise",
        "single_rise",
        "validation_loss",
    ),
    pictures=("outputs_alike", "weights_aligned", "masked_rise", "random_rise", "least_rise"),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
