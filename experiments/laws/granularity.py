"""Finer and finer experts at equal parameters and FLOPs, and the laws of their loss.

    python -m experiments.laws.granularity --scale=demo

16 standard FFNs are cut into 16 m experts of 1/m the width, and 2 m of them are activated, for m of
1 to 16.  On this line no expert is shared: one shared expert would be half of what is activated at
m = 1 and a thirty-second of it at m = 16, so two things would change at once.  m = 1 is GShard.
DeepSeekMoE itself (m = 4, one of the 64 experts shared) stands beside the line, at its level.

Held fixed: all expert parameters and activated ones, FLOPs as the paper counts them (without the
router), steps, tokens, data, order, learning rate and initial deviation.  Not fixed: the router has
a row for each expert, so it grows with m; in the narrow models of the demo scale 11 % of what is
activated at m = 16 is router.  granularity_time.py asks what that costs.

The granularity of arXiv 2402.07871 is m, that of 2507.17702 is 3 m / 4.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import decreasing
from dsmoe_jax.study.experiment import Arm, Equal, Experiment
from experiments.laws import sizes

SPLITS = (1, 2, 4, 8, 16)
LINE = "no shared expert"


def split(m: int, options: str = "") -> Arm:
    """A model of 16 m experts, 2 m of them activated and none shared."""
    return Arm(f"m = {m}", "dsmoe_2b", f"split={m},shared=0{options}", x=m, line=LINE)


ARMS = (*(split(m) for m in SPLITS), Arm("DeepSeekMoE", "dsmoe_2b"))
LABELS = tuple(arm.label for arm in ARMS)
EQUAL_SIZES = (
    # At the paper's scale widths are rounded: 53 of 53.33 at m = 16.
    Equal("expert_total", LABELS, 0.002),
    Equal("expert_activated", LABELS, 0.002),
    Equal("flops_per_sequence", LABELS, 0.001),
    # The router: 16 rows at m = 1, 256 at m = 16.
    Equal("total", LABELS, 0.04),
    Equal("activated", LABELS, 0.17),
)

EXPERIMENT = Experiment(
    module="experiments.laws.granularity",
    title="Granularity at equal FLOPs",
    source="arXiv 2402.07871 (granularity law); 2507.17702 (U-shape); DeepSeekMoE (2401.06066),"
    " figure 3",
    summary="By the law of 2402.07871 the loss falls with every finer cut, each time by less; by"
    " 2507.17702 there is an optimum, at m of about 11 to 16. (Arms read: m experts for each"
    " standard FFN.)",
    arms=ARMS,
    equal=EQUAL_SIZES,
    claims=decreasing(*LABELS[:-1], source="2402.07871"),
    analyses=("granularity_law", "granularity_u_shape", "effective_compute"),
    baseline=sizes.GSHARD,
    x_axis="m, experts cut from each standard FFN",
    x_scale="log",
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
