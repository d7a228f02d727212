"""Fewer routed experts activated than in training (V1 figure 5).

python -m experiments.v1.table1 --scale=demo    # trains the models
python -m experiments.v1.fig5 --scale=demo      # measures them
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.study.claims import below, ratio_below
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.v1 import table1


def activated(k: int) -> ProbeArm:
    """Probe of DeepSeekMoE with `k` routed experts activated instead of 7."""
    few = Intervention(num_experts_per_tok=k)
    return ProbeArm(f"{k} of 7", table1.EXPERIMENT, "DeepSeekMoE", few, x=k)


EXPERIMENT = Experiment(
    module="experiments.v1.fig5",
    title="Fewer routed experts than in training",
    source="DeepSeekMoE (arXiv 2401.06066), figure 5",
    summary="With only 4 of its 7 routed experts activated DeepSeekMoE comes close to GShard, which"
    " activates as many parameters as all 7. (Arms read: routed experts activated.)",
    arms=(
        ProbeArm("GShard", table1.EXPERIMENT, "GShard"),
        *(activated(k) for k in (3, 4, 5, 6, 7)),
    ),
    claims=(
        below("7 of 7", "GShard", source="figure 5"),
        # "Comparable" is read as within 1 %.
        ratio_below("4 of 7", "GShard", 1.01, source="figure 5"),
    ),
    measures=(
        "validation_loss",
        "validation_bits_per_byte",
        "activated",
        "flops_per_sequence",
        "maxvio",
        "dead_experts",
    ),
    pictures=("over_x", "final_loss", "domains", "expert_load"),
    x_axis="routed experts activated",
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
