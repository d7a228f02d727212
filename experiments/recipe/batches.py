"""The batch size at the same number of tokens: what each model of table 1 likes.

    python -m experiments.recipe.batches --scale=demo

Twice the batch has half the steps and half the warm-up.  The learning rate stays that of the scale,
so a batch may lose here that would win at a rate of its own.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.experiment import Experiment
from experiments.recipe import _sweep as sweep

BATCHES = (0.5, 1.0, 2.0)
MULTIPLES = {
    "train.global_batch_size": 1,
    "train.steps": -1,
    "optimizer.warmup_steps": -1,
    "train.eval_batches": -1,  # the same held-out text
}

EXPERIMENT = Experiment(
    module="experiments.recipe.batches",
    title="The batch size of each model",
    source="DeepSeekMoE (arXiv 2401.06066), section 4.1.3 and table 1",
    summary="V1 trains all models with batches of one size and finds DeepSeekMoE below GShard.",
    arms=sweep.arms(BATCHES, MULTIPLES),
    equal=sweep.equal(BATCHES),
    claims=sweep.main_claims(BATCHES),
    may_differ=("name", "model.moe.", *MULTIPLES),
    measures=("validation_loss", "validation_bits_per_byte", "maxvio", "dead_experts"),
    pictures=("over_x",),
    analyses=("best_of_lines",),
    x_axis="sequences in a batch, times those of the scale",
    x_scale="log",
    seeds={"smoke": 1, "demo": 2, "gpu": 1, "proxy": 1, "paper": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
