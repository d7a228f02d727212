"""Softmax affinities (V1, V2) against sigmoid affinities (V3), with and without normalised gates.

    python -m experiments.v3.scoring --scale=demo

V3 changed the affinity and normalised the gates at once; here the two are apart.  The balance loss
is the config's, over affinities that sum to 1 for each token.  V3 gives no comparison, so nothing
is claimed.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total
from experiments.laws import sizes

NORMALISED = {"model.moe.router.norm_topk_prob": True}
SIGMOID = {"model.moe.router.scoring_func": "sigmoid"}
ARMS = (
    Arm("softmax", "dsmoe_2b"),
    Arm("softmax, normalised", "dsmoe_2b", overrides=NORMALISED),
    Arm("sigmoid", "dsmoe_2b", overrides=SIGMOID),
    Arm("sigmoid, normalised", "dsmoe_2b", overrides={**SIGMOID, **NORMALISED}),
)
LABELS = tuple(arm.label for arm in ARMS)

EXPERIMENT = Experiment(
    module="experiments.v3.scoring",
    title="Softmax or sigmoid affinities",
    source="DeepSeek-V3 (arXiv 2412.19437), section 2.1.2",
    summary="V3 takes sigmoid affinities and gates that sum to 1 for each token, where V1 and V2"
    " take softmax affinities as gates.",
    arms=ARMS,
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
