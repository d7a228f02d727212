"""Shared expert off, one more routed expert on (V1 section 4.5).

python -m experiments.v1.table1 --scale=demo              # trains the model
python -m experiments.v1.no_shared_expert --scale=demo    # measures it
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.planning.papers import V1
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.v1 import table1

OFF = Intervention(num_experts_per_tok=8, shared_experts=False)

EXPERIMENT = Experiment(
    module="experiments.v1.no_shared_expert",
    title="A routed expert in place of the shared one",
    source="DeepSeekMoE (arXiv 2401.06066), section 4.5",
    summary="The shared expert holds what the routed ones do not: without it, and with one more of"
    " them, the loss is far higher at the same FLOPs.",
    arms=(
        ProbeArm("as trained", table1.EXPERIMENT, "DeepSeekMoE", paper_loss=V1["dsmoe_2b"].loss),
        ProbeArm("0 + 63 (8)", table1.EXPERIMENT, "DeepSeekMoE", OFF, paper_loss=2.414),
    ),
    measures=("validation_loss", "validation_bits_per_byte", "maxvio", "dead_experts"),
    pictures=("final_loss", "domains", "expert_load"),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
