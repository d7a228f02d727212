"""Experts of a token on at most M devices, M = 1 to D (V2 sections 2.2.2 and 2.2.3).

    python -m experiments.v2.device_limits --scale=demo

The 63 routed experts are on D = 7 devices (V2: 8), so that each has 9 of them.  M = 7 limits
nothing.  All arms have V2's three balance losses with its factors.  A token is sent once to each
device that has experts of it: that traffic is counted, whether or not the run itself was on several
devices.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import decreasing, ratio_below
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total
from experiments.laws import sizes

D = 7
V2 = {
    "model.moe.expert_groups": D,
    "model.moe.router.n_group": D,
    "model.moe.balance.expert.factor": 0.003,
    "model.moe.balance.device.factor": 0.05,
    "model.moe.balance.communication.factor": 0.02,
}


def limited(m: int) -> Arm:
    """A model whose tokens go to at most `m` devices."""
    return Arm(f"M = {m}", "dsmoe_2b", overrides={**V2, "model.moe.router.topk_group": m})


ARMS = tuple(limited(m) for m in range(1, D + 1))
LABELS = tuple(arm.label for arm in ARMS)
ENOUGH = LABELS[2:-1]  # M = 3 and more, but for the arm without a limit

EXPERIMENT = Experiment(
    module="experiments.v2.device_limits",
    title="A limit to the devices of a token",
    source="DeepSeek-V2 (arXiv 2405.04434), section 2.2.2",
    summary="With the experts of a token on M = 3 devices or more the loss is about that of a free"
    " choice; the traffic grows with M.",
    arms=ARMS,
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    claims=(
        # "Roughly aligned" is read as within 0.5 %, as "as good as" for V1's table 2.
        *(ratio_below(label, LABELS[-1], 1.005, source="V2 section 2.2.2") for label in ENOUGH),
        *decreasing(*reversed(LABELS[:3]), measure="device_megabytes", source="V2 section 2.2.2"),
    ),
    measures=(
        "validation_loss",
        "validation_bits_per_byte",
        "device_megabytes",
        "maxvio",
        "maxvio_running",
        "dead_experts",
    ),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
