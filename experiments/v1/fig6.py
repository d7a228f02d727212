"""DeepSeekMoE trained from scratch with half the activated experts, against GShard (V1 figure 6).

    python -m experiments.v1.fig6 --scale=demo

The total of expert parameters is the same; DeepSeekMoE activates one shared and three of its 63
routed experts, one standard FFN in all, and GShard two.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.planning.papers import V1
from dsmoe_jax.study.claims import below
from dsmoe_jax.study.experiment import Arm, Experiment, same_total
from experiments.laws import sizes

HALF = "DeepSeekMoE (half activated)"

EXPERIMENT = Experiment(
    module="experiments.v1.fig6",
    title="Trained with half the activated experts",
    source="DeepSeekMoE (arXiv 2401.06066), figure 6",
    summary="With the same expert parameters in total and only half as many activated, DeepSeekMoE"
    " is still better than GShard.",
    arms=(
        Arm("GShard", "gshard_2b", paper_loss=V1["gshard_2b"].loss),
        Arm(HALF, "dsmoe_2b_half"),
    ),
    equal=same_total("GShard", HALF),
    claims=(below(HALF, "GShard", source="figure 6"),),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
