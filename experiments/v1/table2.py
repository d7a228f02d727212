"""DeepSeekMoE against a GShard of 1.5 times the expert parameters and a dense bound (V1 table 2).

    python -m experiments.v1.table2 --scale=demo

The arms differ in size on purpose: GShard's experts are 1.5 times as large, and the dense model
activates as many expert parameters as DeepSeekMoE has in total.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.planning.papers import V1
from dsmoe_jax.study.claims import ratio_below
from dsmoe_jax.study.experiment import Arm, Experiment
from experiments.laws import sizes

EXPERIMENT = Experiment(
    module="experiments.v1.table2",
    title="DeepSeekMoE against a larger GShard and the dense bound",
    source="DeepSeekMoE (arXiv 2401.06066), table 2",
    summary="DeepSeekMoE is as good as a GShard with 1.5 times the expert parameters and FLOPs, and"
    " nearly as good as the dense model that no mixture of its size can beat.",
    arms=(
        Arm("GShard x1.5", "gshard_2b_x1_5", paper_loss=V1["gshard_2b_x1_5"].loss),
        Arm("Dense x16", "dense_2b_x16", paper_loss=V1["dense_2b_x16"].loss),
        Arm("DeepSeekMoE", "dsmoe_2b", paper_loss=V1["dsmoe_2b"].loss),
    ),
    claims=(
        # "As good as" is read as within 0.5 %, the distance of shared expert counts in section 4.4.
        ratio_below("DeepSeekMoE", "GShard x1.5", 1.005, source="table 2"),
        ratio_below("DeepSeekMoE", "Dense x16", 1.005, source="table 2"),
    ),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
