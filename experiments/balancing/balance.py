"""Balance losses and the loss-free bias, beside a router without balancing, which collapses.

    python -m experiments.balancing.balance --scale=demo

Nine DeepSeekMoE models differ only in the balancing of the router; a conventional mixture without
balance is beside them.  In one of them the balance
term starts after half of the steps, to show the recovery; in another it falls from the start.
Routers that balance by the way they choose experts are in balanced_routers.py.  The results are in
docs/routers_and_losses.md.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below, bounded, ratio_below
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total
from experiments.laws import sizes

NONE = {"model.moe.balance.expert": None}
GLOBAL = {"model.moe.balance.expert.scope": "global_batch"}
# (share of the steps, multiple of the factor): a jump at half of the steps; a straight fall to 0
LATE = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (1.0, 1.0))
FALLING = ((0.0, 1.0), (1.0, 0.0))
CONVENTIONAL = "GShard, nothing"
DEVICES = {"model.moe.expert_groups": 9, "model.moe.balance.device.factor": 0.05}  # 7 experts each
TRAFFIC = {  # a token on at most all 9 devices: no limit
    "model.moe.router.n_group": 9,
    "model.moe.router.topk_group": 9,
    "model.moe.balance.communication.factor": 0.02,
}
ARMS = (
    Arm("nothing", "dsmoe_2b", overrides=NONE),
    Arm(
        "loss-free bias", "dsmoe_2b", overrides={**NONE, "model.moe.router.bias_update_speed": 1e-3}
    ),
    Arm("expert loss", "dsmoe_2b"),  # the config's own: 0.01, by sequence
    Arm("global loss", "dsmoe_2b", overrides=GLOBAL),  # the same over the batch
    Arm("late loss", "dsmoe_2b", overrides={"model.moe.balance.expert.schedule": LATE}),
    Arm("falling loss", "dsmoe_2b", overrides={"model.moe.balance.expert.schedule": FALLING}),
    Arm("Switch loss", "dsmoe_2b", overrides={**NONE, "model.moe.balance.switch.factor": 0.01}),
    # These even out devices, not experts: their assignments, and the rows that they receive.
    Arm("device loss", "dsmoe_2b", overrides={**NONE, **DEVICES}),
    Arm("device losses", "dsmoe_2b", overrides={**NONE, **DEVICES, **TRAFFIC}),
)
LABELS = tuple(arm.label for arm in ARMS)
EVEN_OUT = LABELS[1:-2]
V2 = "V2 section 2.2.3"
BLOG = "a blog on V1 with routing, stages and compression"

EXPERIMENT = Experiment(
    module="experiments.balancing.balance",
    title="Collapse without balance, and the ways back",
    source="DeepSeekMoE (arXiv 2401.06066), section 3.3; DeepSeek-V3 (2412.19437), section 2.1.2",
    summary="Without balance a few experts get most of the tokens; a balance loss, or a bias on the"
    " choice of experts, evens the load out.",
    arms=(*ARMS, Arm(CONVENTIONAL, "gshard_2b", overrides=NONE)),
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    claims=(
        *(below(label, "nothing", measure="maxvio_running") for label in EVEN_OUT),
        # One expert chosen by more than half of the tokens: 3.5 with 7 of 63 experts activated.
        bounded("nothing", above=3.5, measure="maxvio_running"),
        *(below(label, "nothing") for label in EVEN_OUT),
        # "Without hurting" is read as within 0.5 %, as "as good as" for V1's table 2.
        ratio_below("loss-free bias", "nothing", 1.005),
        below("falling loss", "expert loss", source="an analysis of V2: balance early"),
        below("expert loss", "device loss", measure="maxvio_running", source="V1 section 3.3"),
        # Even is read as within a fifth of the mean.
        bounded("device loss", below=0.2, measure="device_maxvio", source="V1 section 3.3"),
        below("device losses", "device loss", measure="traffic_maxvio", source=V2),
        bounded("device losses", below=0.2, measure="traffic_maxvio", source=V2),
        bounded(CONVENTIONAL, above=50, measure="busiest_three", source=BLOG),
    ),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
