"""DeepSeekMoE 145B, and 142B with half the activated experts, beside GShard and dense (V1 table 6).

    python -m experiments.v1.table6 --scale=demo
    python -m experiments.v1.table6 --scale=paper --plan --chip=v5p --chips=1024

GShard 137B has about the sizes of DeepSeekMoE 145B.  The other two differ on purpose: 142B
activates half the experts, and the dense DeepSeek 67B is twice as wide and half as deep again, at
every scale.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.planning.papers import V1
from dsmoe_jax.study.experiment import Arm, Equal, Experiment

GSHARD = "GShard 137B"
FULL = "DeepSeekMoE 145B"
HALF = "DeepSeekMoE 142B (half activated)"

EXPERIMENT = Experiment(
    module="experiments.v1.table6",
    title="DeepSeekMoE 145B beside GShard and a dense model",
    source="DeepSeekMoE (arXiv 2401.06066), table 6",
    summary="DeepSeekMoE 145B is better than GShard 137B at about the same sizes and FLOPs, and"
    " better than DeepSeek 67B with 28.5 % of its FLOPs; so is DeepSeekMoE 142B with 18.2 %.",
    arms=(
        Arm("DeepSeek 67B", "deepseek_67b", paper_loss=V1["deepseek_67b"].loss),
        Arm(GSHARD, "gshard_137b", paper_loss=V1["gshard_137b"].loss),
        Arm(FULL, "dsmoe_145b", paper_loss=V1["dsmoe_145b"].loss),
        Arm(HALF, "dsmoe_142b_half", paper_loss=V1["dsmoe_142b_half"].loss),
    ),
    # About as near as the paper's own figures: 136.5B, 142.3B and 144.6B in total, 21.6B and 22.2B
    # activated, 572.7T and 585.6T FLOPs.  In a tiny model the router adds to the distance.
    equal=(
        Equal("total", (FULL, GSHARD), 0.06),
        Equal("expert_total", (FULL, HALF), 0.02),
        Equal("activated", (FULL, GSHARD), 0.05),
        Equal("flops_per_sequence", (FULL, GSHARD), 0.03),
    ),
    may_differ=("name", "model."),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
