"""1, 2 or 4 shared experts of 64 (V1 section 4.4).

python -m experiments.v1.shared_ratio --scale=demo
"""

import dataclasses
import itertools

from dsmoe_jax.commands import experiment
from dsmoe_jax.planning.papers import V1
from dsmoe_jax.study.claims import Claim, ratio_below
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total
from experiments.laws import sizes

ARMS = (
    Arm("1 + 63 (7)", "dsmoe_2b", "shared=1", paper_loss=V1["dsmoe_2b"].loss),
    Arm("2 + 62 (6)", "dsmoe_2b", "shared=2", paper_loss=V1["dsmoe_2b_shared2"].loss),
    Arm("4 + 60 (4)", "dsmoe_2b", "shared=4", paper_loss=V1["dsmoe_2b_shared4"].loss),
)
LABELS = tuple(arm.label for arm in ARMS)


def close_to(one: str, other: str) -> Claim:
    """Claim that an arm is at most a little worse than another one."""
    claim = ratio_below(one, other, 1.005, source="section 4.4")
    return dataclasses.replace(claim, text=f"{one} at most 0.5 % above {other}")


EXPERIMENT = Experiment(
    module="experiments.v1.shared_ratio",
    title="One, two or four shared experts of 64",
    source="DeepSeekMoE (arXiv 2401.06066), section 4.4",
    summary="The number of shared experts makes little difference; two are slightly better than one"
    " or four. (Arms read: shared + routed experts, routed ones activated.)",
    arms=ARMS,
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    # "Little difference" is read as within 0.5 %: of any two numbers neither is better by more.
    claims=tuple(close_to(one, other) for one, other in itertools.permutations(LABELS, 2)),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
