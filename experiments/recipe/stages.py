"""Three stages of training beside settings that do not change.

    python -m experiments.recipe.stages --scale=demo

The stages have growing numbers of activated experts, smaller batches and lower rates, see
configs/dsmoe_2b_staged.py.  Tokens and activated experts are equal in the mean.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below
from dsmoe_jax.study.experiment import Arm, Equal, Experiment, same_total
from experiments.laws import sizes

ARMS = (Arm("constant", "dsmoe_2b"), Arm("three stages", "dsmoe_2b_staged"))
LABELS = tuple(arm.label for arm in ARMS)
CONSTANT, STAGED = LABELS
ACTIVATED = ("expert_activated", "activated", "flops_per_sequence")

EXPERIMENT = Experiment(
    module="experiments.recipe.stages",
    title="Training in three stages",
    source="a blog on DeepSeekMoE, which names no paper",
    summary="Few experts in large batches at a high rate first, more experts in smaller batches at"
    " a lower rate later.",
    arms=ARMS,
    # Means over the tokens, so up to whole steps; of smoke there are 8.
    equal=(*same_total(*LABELS), *(Equal(key, LABELS, 0.01) for key in ACTIVATED)),
    claims=(below(STAGED, CONSTANT),),
    may_differ=("name", "train.steps", "train.stages", "train.stages.", "optimizer.schedule"),
    measured_may_differ=("tokens",),  # up to whole steps, too
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
