"""Purpose of the float32 router and the z-loss: training at a rate that is too high.

    python -m experiments.balancing.router_stability --scale=demo

DeepSeekMoE at twice the peak rate of its scale, with logits of the router in float32 or bfloat16,
each with and without the router z-loss (ST-MoE's factor, 0.001).  All else has the scale's dtype:
float32 on a CPU.  The model at its own rate is beside them.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total

RATE = "optimizer.peak_learning_rate"
TWICE = {RATE: 2.0}
Z_LOSS = {"model.moe.balance.router_z.factor": 1e-3}
BFLOAT16 = {"model.moe.router.logits_dtype": "bfloat16"}
ARMS = (
    Arm("own rate", "dsmoe_2b"),
    Arm("float32", "dsmoe_2b", multiples=TWICE),
    Arm("float32, z-loss", "dsmoe_2b", overrides=Z_LOSS, multiples=TWICE),
    Arm("bfloat16", "dsmoe_2b", overrides=BFLOAT16, multiples=TWICE),
    Arm("bfloat16, z-loss", "dsmoe_2b", overrides={**BFLOAT16, **Z_LOSS}, multiples=TWICE),
)
LABELS = tuple(arm.label for arm in ARMS)
OWN, FLOAT32, FLOAT32_Z, BFLOAT16_ALONE, BFLOAT16_Z = LABELS
LECTURE = "a lecture on mixtures of experts"

EXPERIMENT = Experiment(
    module="experiments.balancing.router_stability",
    title="A float32 router and the z-loss at a high rate",
    source="Switch (2101.03961), section 2.4; ST-MoE (2202.08906), section 3.3",
    summary="A router in float32 and a penalty on large logits keep training from becoming"
    " unstable.",
    arms=ARMS,
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    claims=(
        below(OWN, FLOAT32),  # else there is nothing to prevent
        below(FLOAT32, BFLOAT16_ALONE, source=LECTURE),
        below(FLOAT32, BFLOAT16_ALONE, measure="loss_rise", source=LECTURE),
        below(FLOAT32_Z, FLOAT32, source=LECTURE),
        below(FLOAT32_Z, FLOAT32, measure="loss_rise", source=LECTURE),
        below(BFLOAT16_Z, BFLOAT16_ALONE, source=LECTURE),
    ),
    may_differ=("name", "model.moe.", RATE),
    measures=("validation_loss", "validation_bits_per_byte", "loss_rise", "maxvio", "dead_experts"),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
