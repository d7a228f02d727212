"""Routers that balance the load by the way they choose experts, beside one without balancing.

    python -m experiments.balancing.balanced_routers --scale=demo

The full recipes of V2 (groups of experts by device, three losses) and V3 (sigmoid affinities, bias,
groups, a small sequence loss), and their rivals: Sinkhorn, REINFORCE, expert choice (which leaks
future tokens, so that its loss does not compare) and BASE (one expert of sixteen).  Single losses
and the bias alone are in balance.py.  The results are in docs/routers_and_losses.md.
"""

from collections.abc import Mapping

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below, ratio_below
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total


def moe(settings: Mapping[str, object]) -> dict[str, object]:
    """Overrides of the MoE layer; the expert loss is off unless they set it."""
    own = "balance.expert.factor" in settings
    settings = settings if own else {"balance.expert": None, **settings}
    return {f"model.moe.{key}": value for key, value in settings.items()}


# Groups of 7 experts; the paper: 8 and 3.
GROUPS = {"router.n_group": 9, "router.topk_group": 3, "expert_groups": 9}
V2 = {
    **GROUPS,
    "balance.expert.factor": 0.003,
    "balance.device.factor": 0.05,
    "balance.communication.factor": 0.02,
}
V3 = {
    **GROUPS,
    "router.scoring_func": "sigmoid",
    "router.norm_topk_prob": True,
    "router.group_score": "top2_sum",
    "router.bias_update_speed": 1e-2,  # the paper: 1e-3, for many more steps than a demo has
    "balance.sequence.factor": 1e-4,
}
REINFORCE = {"router.name": "reinforce", "router.options.entropy_factor": 0.01}
BASE = {"router.name": "base"}
ARMS = (
    Arm("nothing", "dsmoe_2b", overrides=moe({})),
    Arm("V2", "dsmoe_2b", overrides=moe(V2)),
    Arm("V3", "dsmoe_2b", overrides=moe(V3)),
    Arm("Sinkhorn", "dsmoe_2b", overrides=moe({"router.name": "sinkhorn"})),
    Arm("REINFORCE", "dsmoe_2b", overrides=moe(REINFORCE)),
    Arm("expert choice", "dsmoe_2b", overrides=moe({"router.name": "expert_choice"})),
    Arm("BASE", "switch_2b", overrides=moe(BASE)),
)
LABELS = tuple(arm.label for arm in ARMS)

EXPERIMENT = Experiment(
    module="experiments.balancing.balanced_routers",
    title="Routers that balance by how they choose",
    source="DeepSeek-V2 (arXiv 2405.04434), section 2.2; DeepSeek-V3 (2412.19437), section 2.1.2;"
    " 2202.01169 (Sinkhorn, REINFORCE); 2202.09368 (expert choice); 2103.16716 (BASE)",
    summary="A router can choose evenly by construction, or be kept even by groups, losses and a"
    " bias together.",
    arms=ARMS,
    equal=(*same_total(*LABELS), *same_activated(*LABELS[:-1])),
    claims=(
        *(below(label, "nothing", measure="maxvio_running") for label in ("V2", "V3")),
        # REINFORCE has no clear advantage: it is not better than top-k by more than 0.5 %.
        *(ratio_below(label, "REINFORCE", 1.005) for label in ("nothing", "V2")),
    ),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
