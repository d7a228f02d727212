"""Loss against experts left: pruned at random, by use, by likeness, and by what each is missed.

    python -m experiments.v1.fig3 --scale=demo              # these train the models
    python -m experiments.v1.table2 --scale=demo
    python -m experiments.surgery.pruning --scale=demo      # prunes them

V1 says that DeepSeekMoE's routed experts are less redundant than GShard's.  Then it should lose
more with the same share of them gone for good.  Experts are chosen on training text and the loss is
that of the run's held-out text; nothing is trained afterwards.

A blog calls experts that are more alike than 0.85 superfluous.  So it is also asked how alike the
most alike two are, in their outputs.
"""

import functools

from dsmoe_jax.commands import experiment
from dsmoe_jax.study import fewer_experts
from dsmoe_jax.study.claims import Claim, below, bounded
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.surgery._models import GSHARD, LARGER, MODELS, OURS, SHARES, arms, label, panels

WAYS = {
    "at random": fewer_experts.RANDOM,
    "by use": "use",
    "by weights": "weights",
    "by outputs": "outputs",
    "by loss": "loss",
}
BY_THRESHOLD = "by threshold"
RISE, MOST_ALIKE = "rise", "most_alike"
BLOG = "a blog on V1"


def without_alike(name: str) -> ProbeArm:
    """A model without the experts whose outputs are more alike than 0.85 to another's."""
    model = MODELS[name]
    probe = functools.partial(fewer_experts.pruned, by="outputs")
    return ProbeArm(f"{name} {BY_THRESHOLD}", model.experiment, model.arm, probe=probe)


def rises_more(rival: str, source: str) -> tuple[Claim, ...]:
    """Claims that DeepSeekMoE loses more than a rival, for each way and share."""
    return tuple(
        below(label(rival, way, share), label(OURS, way, share), measure=RISE, source=source)
        for way in WAYS
        for share in SHARES
    )


EXPERIMENT = Experiment(
    module="experiments.surgery.pruning",
    title="Loss against experts left: pruning",
    source="DeepSeekMoE (arXiv 2401.06066), sections 3 and 4.5; a blog on V1",
    summary="DeepSeekMoE's routed experts are said to be less redundant than GShard's, and those"
    " that are more alike than 0.85 to be superfluous. Less redundant is read as: the loss rises"
    " more with the same share of all experts left. Experts go at random; by use, those with the"
    " fewest tokens; by the likeness of their weights or outputs, one of the most alike two, again"
    " and again; or by the loss without each of them alone. All is counted on training text,"
    " judged on held-out text, and nothing is trained afterwards. (Labels end in the share of all"
    " experts that is left, with DeepSeekMoE's shared one.)",
    arms=(
        *(arm for way, by in WAYS.items() for arm in arms(way, fewer_experts.pruned, by)),
        *map(without_alike, MODELS),
    ),
    claims=(
        *rises_more(LARGER, "V1 section 4.5"),
        *rises_more(GSHARD, "V1 section 3"),
        # There are such experts, and what goes with them is less than 0.5 %.
        *(
            bounded(f"{name} {BY_THRESHOLD}", above=0.85, measure=MOST_ALIKE, source=BLOG)
            for name in MODELS
        ),
        *(
            bounded(f"{name} {BY_THRESHOLD}", below=0.5, measure="rise_percent", source=BLOG)
            for name in MODELS
        ),
    ),
    measures=(
        RISE,
        "rise_percent",
        "validation_loss",
        "experts_left",
        "parameters_left",
        MOST_ALIKE,
    ),
    pictures=("panels_over_x",),
    x_axis="share of all experts that is left",
    panels=panels(WAYS),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
