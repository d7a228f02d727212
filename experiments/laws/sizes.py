"""GShard and DeepSeekMoE at four sizes: the law of the loss in compute, to read ablations against.

    python -m experiments.laws.sizes --scale=demo

Widths are 50, 75, 100 and 150 per cent of the scale's hidden size.  The tokens grow with the square
of the width, as the experts' parameters do, so that compute grows along one path with the same
tokens for each of them; whether another path to the same compute has a lower loss is not asked.
Learning rate and initial deviation go as width^-1/2, as from scale to scale in configs/base.py.
At 100 per cent the models and their runs are those of table 1 (V1).

Other experiments read `GSHARD` from these results: how much compute GShard would need for the loss
that one of their arms has.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below
from dsmoe_jax.study.experiment import Arm, Baseline, Equal, Experiment, same_total

STEPS = {50: 25, 75: 56, 100: 100, 150: 225}  # by width; all in per cent of the scale's
MODELS = {"GShard": "gshard_2b", "DeepSeekMoE": "dsmoe_2b"}


def sized(line: str, width: int) -> Arm:
    """A model of `width` per cent of the scale's hidden size."""
    options = f"width_percent={width},steps_percent={STEPS[width]}"
    return Arm(f"{line}, {width} %", MODELS[line], options, x=width, line=line)


def same_sizes(width: int) -> tuple[Equal, ...]:
    """Rules that the models of a width are equal but for the router."""
    arms = tuple(f"{line}, {width} %" for line in MODELS)
    return (
        *same_total(*arms),
        Equal("activated", arms, 0.05),  # the router, in the narrowest model of the tests
        Equal("expert_activated", arms, 0.001),
        Equal("flops_per_sequence", arms, 0.001),
    )


EXPERIMENT = Experiment(
    module="experiments.laws.sizes",
    title="Loss over compute",
    source="The form L = E + A / C^alpha of compute laws; models of DeepSeekMoE (arXiv 2401.06066),"
    " table 1",
    summary="DeepSeekMoE is better than GShard at every size.",
    arms=tuple(sized(line, width) for width in STEPS for line in MODELS),
    equal=tuple(rule for width in STEPS for rule in same_sizes(width)),
    claims=tuple(
        below(f"DeepSeekMoE, {width} %", f"GShard, {width} %", source="V1 tables 1 and 6")
        for width in STEPS
    ),
    may_differ=(
        "name",
        "model.",
        "optimizer.peak_learning_rate",
        "optimizer.warmup_steps",
        "train.steps",
    ),
    measured_may_differ=("tokens",),
    pictures=("over_x",),
    analyses=("compute_law",),
    x_axis="hidden size, % of the scale's; tokens grow as its square",
    x_scale="log",
)
GSHARD = Baseline(EXPERIMENT, "GShard", "GShard, 100 %")

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
