"""Expert isolation and finer experts, one step at a time (V1 figure 3).

    python -m experiments.v1.fig3 --scale=demo

From GShard's 16 experts: one becomes shared, then all are cut in two, then in four.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.planning.papers import V1
from dsmoe_jax.study.claims import decreasing
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total
from experiments.laws import sizes

ARMS = (
    Arm("0 + 16 (2)", "gshard_2b", paper_loss=V1["gshard_2b"].loss),
    Arm("1 + 15 (1)", "dsmoe_2b", "split=1"),
    Arm("1 + 31 (3)", "dsmoe_2b", "split=2"),
    Arm("1 + 63 (7)", "dsmoe_2b", paper_loss=V1["dsmoe_2b"].loss),
)
LABELS = tuple(arm.label for arm in ARMS)

EXPERIMENT = Experiment(
    module="experiments.v1.fig3",
    title="What isolating a shared expert and cutting experts finer bring",
    source="DeepSeekMoE (arXiv 2401.06066), figure 3",
    summary="Isolating one shared expert helps, and so does every finer cut of the experts, at the"
    " same parameters and FLOPs. (Arms read: shared + routed experts, routed ones activated.)",
    arms=ARMS,
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    # The figure shows that each step is better than the one before, without losses.
    claims=decreasing(*LABELS),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
