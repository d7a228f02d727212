"""The peak learning rate: what each model of table 1 likes.

    python -m experiments.recipe.rates --scale=demo

An ablation at one learning rate can crown the model that likes that rate.  Here every model is
trained with every rate, a factor of the square root of 2 apart around the scale's.  The rule,
made before the sweep at the demo scale: the scale takes the rate with the lowest validation loss,
mean over the five models and the seeds; V1 too has one rate for all (section 4.1.3).  The report
shows the loss over the rate for each model, and each at its own best.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.experiment import Experiment
from experiments.recipe import _sweep as sweep

RATES = (0.5, 0.707, 1.0, 1.414)

EXPERIMENT = Experiment(
    module="experiments.recipe.rates",
    title="The peak learning rate of each model",
    source="DeepSeekMoE (arXiv 2401.06066), section 4.1.3 and table 1",
    summary="V1 trains all models with one learning rate and finds DeepSeekMoE below GShard.",
    arms=sweep.arms(RATES, {sweep.RATE: 1}),
    equal=sweep.equal(RATES),
    claims=sweep.main_claims(RATES),
    may_differ=("name", "model.moe.", sweep.RATE),
    measures=("validation_loss", "validation_bits_per_byte", "maxvio", "dead_experts"),
    pictures=("over_x",),
    x_axis="peak learning rate, times that of the scale",
    x_scale="log",
    seeds={"smoke": 1, "demo": 2, "gpu": 1, "proxy": 1, "paper": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
