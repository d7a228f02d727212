"""Ways to learn a router, beside top-k softmax with its balance loss and beside Hash.

    python -m experiments.balancing.learned_routers --scale=demo

Seven of 63 experts: top-k softmax with the expert loss, noisy top-k (noise in place of a loss, and
with it), Sinkhorn, REINFORCE.  One of 16, for these take no other number: Switch, BASE, Hash.  Arms
are compared within their group.  Sinkhorn, REINFORCE and BASE are arms of balanced_routers.py,
where they stand beside the recipes of V2 and V3; Switch and Hash are those of table 1.
2202.01169 compared its three routers with one expert a token.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below, ratio_below
from dsmoe_jax.study.experiment import Arm, Equal, Experiment, same_activated, same_total
from experiments.balancing import balanced_routers
from experiments.v1 import table1

NOISY = {"model.moe.router.name": "noisy_topk"}
NO_LOSS = {"model.moe.balance.expert": None}
SEVEN_OF_63 = (
    Arm("top-k", "dsmoe_2b"),  # the config's own: softmax, expert loss of 0.01
    Arm("noisy top-k", "dsmoe_2b", overrides={**NOISY, **NO_LOSS}),
    Arm("noisy top-k with loss", "dsmoe_2b", overrides=NOISY),
    balanced_routers.EXPERIMENT.arm("Sinkhorn"),
    balanced_routers.EXPERIMENT.arm("REINFORCE"),
)
ONE_OF_16 = (
    table1.EXPERIMENT.arm("Switch"),
    balanced_routers.EXPERIMENT.arm("BASE"),
    table1.EXPERIMENT.arm("Hash Layer"),
)
LECTURE = "a lecture on mixtures of experts"
FINE = tuple(arm.label for arm in SEVEN_OF_63)
COARSE = tuple(arm.label for arm in ONE_OF_16)

EXPERIMENT = Experiment(
    module="experiments.balancing.learned_routers",
    title="Ways to learn a router",
    source="1701.06538 (noisy top-k); 2202.01169 (Sinkhorn, REINFORCE, Hash); 2103.16716 (BASE);"
    " DeepSeekMoE (arXiv 2401.06066), table 1",
    summary="Routers that learn beat a fixed table of hashes. Noise was given up for balance"
    " losses. Learning by REINFORCE comes near the others, without a clear advantage.",
    arms=(*SEVEN_OF_63, *ONE_OF_16),
    equal=(
        *same_total(*FINE, *COARSE),
        Equal("activated", FINE, 0.05),  # the scale of the noise is a second router matrix
        Equal("expert_activated", FINE, 0.001),
        Equal("flops_per_sequence", FINE, 0.001),
        *same_activated(*COARSE),
    ),
    claims=(
        below("Switch", "Hash Layer", source="V1 table 1"),
        below("BASE", "Hash Layer", source="2202.01169, there by Sinkhorn's algorithm"),
        below("Sinkhorn", "REINFORCE", source="2202.01169"),
        # "Competitive" is read as within 1 %, "no clear advantage" as not more than 1 % better.
        ratio_below("REINFORCE", "Sinkhorn", 1.01, source="2202.01169"),
        ratio_below("top-k", "REINFORCE", 1.01, source=LECTURE),
        ratio_below("top-k", "noisy top-k", 1.01, source=LECTURE),
        below("top-k", "noisy top-k", measure="maxvio", source=LECTURE),
    ),
    measures=(
        "validation_loss",
        "validation_bits_per_byte",
        "maxvio",
        "maxvio_running",
        "dead_experts",
        "domain_specialisation",
    ),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
