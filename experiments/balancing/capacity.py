"""The capacity of an expert: what dropping costs in quality.

    python -m experiments.balancing.capacity --scale=demo

GShard whose experts take at most 1, 1.25, 1.5 or 2 times their mean load, in training; what comes
later in the batch is dropped (2006.16668, algorithm 1).  Held-out text is judged without dropping.
The traffic and memory of a fixed number of slots grow in proportion: claim 42 of the ledger.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import decreasing
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total
from experiments.laws import sizes
from experiments.v1 import table1

CAPACITIES = (1.0, 1.25, 1.5, 2.0)


def _label(capacity: float) -> str:
    return f"capacity {capacity:g}"


def _limited(capacity: float) -> Arm:
    drop = {"model.moe.drop.policy": "position", "model.moe.drop.capacity_factor": capacity}
    return Arm(_label(capacity), "gshard_2b", overrides=drop, x=capacity, line="GShard")


UNLIMITED = table1.EXPERIMENT.arm("GShard")
LABELS = (*map(_label, CAPACITIES), UNLIMITED.label)

EXPERIMENT = Experiment(
    module="experiments.balancing.capacity",
    title="The capacity of an expert",
    source="GShard (2006.16668), section 2.2; Switch (2101.03961), section 2.2",
    summary="A higher capacity drops fewer tokens and gives a lower loss. (GShard: no limit.)",
    arms=(*map(_limited, CAPACITIES), UNLIMITED),
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    claims=decreasing(_label(CAPACITIES[0]), _label(CAPACITIES[-1]), UNLIMITED.label),
    pictures=("over_x",),
    x_axis="capacity, times the mean load of an expert",
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
