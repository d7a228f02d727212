"""Finer and finer experts at equal wall-clock.

    python -m benchmarks.granularity --scale=demo       # measures `STEP_TIMES` below
    python -m experiments.laws.granularity_time --scale=demo

The models of granularity.py, each trained for as many steps as take the time of m = 4.  The
schedule of the learning rate ends with the steps, and the warm-up is the same share of them; the
tokens differ on purpose.  The results' column of seconds says how equal the times came out.

The times hold for one machine and one scale: for another, measure them there first.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.experiment import Arm, Experiment
from experiments.laws import granularity

# Time of a training step over that at m = 4: `python -m benchmarks.granularity --scale=demo
# --repeats=5`, two cores, while other jobs took most of them.  To be measured again on quiet ones.
STEP_TIMES = {1: 0.74, 2: 0.87, 4: 1.0, 8: 1.63, 16: 2.07}


def timed(m: int) -> Arm:
    """The model of 16 m experts, for the time of m = 4."""
    return granularity.split(m, f",steps_percent={round(100 / STEP_TIMES[m])}")


ARMS = tuple(timed(m) for m in granularity.SPLITS)
LABELS = tuple(arm.label for arm in ARMS)

EXPERIMENT = Experiment(
    module="experiments.laws.granularity_time",
    title="Granularity at equal wall-clock",
    source="arXiv 2507.17702 (U-shape); no paper has this sweep at equal wall-clock",
    summary="Finer experts take longer for each step, on each machine differently.",
    arms=ARMS,
    may_differ=("name", "model.moe.", "train.steps", "optimizer.warmup_steps"),
    measured_may_differ=("tokens",),
    measures=(
        "validation_loss",
        "validation_bits_per_byte",
        "seconds",
        "tokens",
        "expert_total",
        "flops_per_sequence",
        "maxvio",
        "dead_experts",
    ),
    pictures=("over_x", "final_loss", "learning_curves", "seconds", "maxvio_running"),
    analyses=("equal_time", "granularity_u_shape"),
    x_axis="m, experts cut from each standard FFN",
    x_scale="log",
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
