"""Dropping by device, with and without protected sequences, in training and in evaluation (V2).

    python -m experiments.v2.dropping --scale=demo

The 63 routed experts are on 7 devices (V2: 8).  Above a capacity of 1.0 times its mean load a
device drops the assignments of lowest affinity; V2 protects about 10 % of the sequences.  The
validation loss is without dropping but for the last two arms.  V2 says that this keeps training and
evaluation consistent and prints no number; consistent is read as within 0.5 %.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below, ratio_below
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total
from experiments.laws import sizes

DEVICES = {
    "model.moe.expert_groups": 7,
    "model.moe.balance.expert.factor": 0.003,
    "model.moe.balance.device.factor": 0.05,
}
DROP = {"model.moe.drop.policy": "device", "model.moe.drop.capacity_factor": 1.0}
PROTECTED = {**DROP, "model.moe.drop.protected_share": 0.1}
UNPROTECTED = {**DROP, "model.moe.drop.protected_share": 0.0}
# Every sequence is judged alike: none is protected.
EVALUATION = {
    "model.moe.evaluation_drop.policy": "device",
    "model.moe.evaluation_drop.capacity_factor": 1.0,
    "model.moe.evaluation_drop.protected_share": 0.0,
}
ARMS = (
    Arm("none", "dsmoe_2b", overrides=DEVICES),
    Arm("protected", "dsmoe_2b", overrides={**DEVICES, **PROTECTED}),  # V2
    Arm("unprotected", "dsmoe_2b", overrides={**DEVICES, **UNPROTECTED}),
    Arm("protected (evaluation too)", "dsmoe_2b", overrides={**DEVICES, **PROTECTED, **EVALUATION}),
    Arm("evaluation only", "dsmoe_2b", overrides={**DEVICES, **EVALUATION}),
)
LABELS = tuple(arm.label for arm in ARMS)
NONE, PROTECTING, UNPROTECTING, BOTH, _ = LABELS

EXPERIMENT = Experiment(
    module="experiments.v2.dropping",
    title="Dropping by device, in training and evaluation",
    source="DeepSeek-V2 (arXiv 2405.04434), section 2.2.4",
    summary="Dropping the assignments of lowest affinity above the capacity of a device bounds its"
    " work; sequences that never lose a token keep a model fit for evaluation without dropping.",
    arms=ARMS,
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    claims=(
        # Trained with dropping a model is fit for evaluation without, and judged with dropping it
        # loses little.
        ratio_below(PROTECTING, NONE, 1.005, source="V2 section 2.2.4"),
        ratio_below(BOTH, PROTECTING, 1.005, source="V2 section 2.2.4"),
        # Without dropping the capacity is unlimited.
        below(NONE, UNPROTECTING),
    ),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
