"""The standard deviation of the initial weights: what each model of table 1 likes.

    python -m experiments.recipe.deviations --scale=demo

V1 takes 0.006 at a hidden size of 1280; a smaller scale the value that grows with the inverse
square root of the hidden size (configs/base.py).
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.experiment import Experiment
from experiments.recipe import _sweep as sweep

DEVIATIONS = (0.5, 1.0, 2.0)
KEY = "model.initializer_range"

EXPERIMENT = Experiment(
    module="experiments.recipe.deviations",
    title="The initial deviation of each model",
    source="DeepSeekMoE (arXiv 2401.06066), section 4.1.3 and table 1",
    summary="V1 initialises all models alike and finds DeepSeekMoE below GShard.",
    arms=sweep.arms(DEVIATIONS, {KEY: 1}),
    equal=sweep.equal(DEVIATIONS),
    claims=sweep.main_claims(DEVIATIONS),
    may_differ=("name", "model.moe.", KEY),
    measures=("validation_loss", "validation_bits_per_byte", "maxvio", "dead_experts"),
    pictures=("over_x",),
    x_axis="initial standard deviation, times that of the scale",
    x_scale="log",
    seeds={"smoke": 1, "demo": 2, "gpu": 1, "proxy": 1, "paper": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
