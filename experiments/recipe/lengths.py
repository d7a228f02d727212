"""The length of training: which orders of table 1 turn with more tokens.

    python -m experiments.recipe.lengths --scale=demo

Every model is trained for half, once, twice and four times the steps of the scale, each time with
the whole schedule.  The text does not grow: at the demo scale the longest run goes through it less
than once.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below, larger_change
from dsmoe_jax.study.experiment import Experiment
from experiments.recipe import _sweep as sweep

LENGTHS = (0.5, 1.0, 2.0, 4.0)
MULTIPLES = {"train.steps": 1, "optimizer.warmup_steps": 1}


def gains_on_hash_layers(model: str):
    """The claim that a model with a learned router gains more from tokens than Hash layers."""
    shortest, longest = LENGTHS[0], LENGTHS[-1]
    return larger_change(
        f"from ×{shortest:g} to ×{longest:g} {model} gains more than Hash layers",
        larger=(sweep.label(model, longest), sweep.label(model, shortest)),
        smaller=(sweep.label("Hash Layer", longest), sweep.label("Hash Layer", shortest)),
        source="V1 table 1",
    )


EXPERIMENT = Experiment(
    module="experiments.recipe.lengths",
    title="More and fewer tokens",
    source="DeepSeekMoE (arXiv 2401.06066), table 1",
    summary="After 100B tokens every learned router is ahead of Hash layers, and DeepSeekMoE ahead"
    " of GShard.",
    arms=sweep.arms(LENGTHS, MULTIPLES),
    equal=sweep.equal(LENGTHS),
    claims=(
        *sweep.main_claims(LENGTHS),
        below(
            sweep.label("Switch", LENGTHS[0]),
            sweep.label("Dense", LENGTHS[-1]),
            source="Switch (2101.03961), figure 1: the same loss in 1/7 of the time",
        ),
        gains_on_hash_layers("GShard"),
        gains_on_hash_layers("DeepSeekMoE"),
    ),
    may_differ=("name", "model.moe.", *MULTIPLES),
    measured_may_differ=("tokens",),
    measures=("validation_loss", "validation_bits_per_byte", "tokens", "maxvio", "dead_experts"),
    pictures=("over_x",),
    analyses=("turns_of_lines",),
    x_axis="steps, times those of the scale",
    x_scale="log",
    seeds={"smoke": 1, "demo": 2, "gpu": 1, "proxy": 1, "paper": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
