"""The best learning rate over widths, with and without muP.

    python -m experiments.laws.widths --scale=demo

DeepSeekMoE 2B at half, once and twice the width of the scale, each with five peak learning rates a
factor of two apart.  Without muP the initial deviation is that of the scale times width^-1/2 and
the rate is the same for all parameters; with muP both follow from the kind of parameter
(dsmoe_jax/model/mup.py; its base is the scale's own width, where the two are the same run).  Runs
have half of the scale's steps.

Where the best rate is cannot be a claim, which is a sum of means: it is marked in the picture.  The
claims are about the slope of the loss over the rate, from the scale's own rate to four times that,
which grows as the best rate moves down; and about the loss of the wide model at that rate.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import Claim, below, larger_change
from dsmoe_jax.study.experiment import Arm, Experiment

WIDTHS = (50, 100, 200)  # per cent of the scale's hidden size, heads and experts' width
RATES = (25, 50, 100, 200, 400)  # per cent of the scale's peak learning rate
BASE = "both"
KINDS = STANDARD, MUP = "standard", "muP"
BOTH = "2203.03466 figure 1; 2508.09752"


def line(width: int, kind: str) -> str:
    """Name of the models of one width: "width 0.5, muP"."""
    return f"width {width / 100:g}, {kind}"


def label(width: int, kind: str, rate: int) -> str:
    """Name of an arm."""
    return f"{line(width, kind)}, rate {rate / 100:g}"


def arm(width: int, kind: str, rate: int) -> Arm:
    """One model; half of the steps, since what is compared is rates."""
    options = f"width={width},rate={rate},steps=50,mup={int(kind != STANDARD)}"
    name = label(width, kind, rate)
    return Arm(name, "dsmoe_2b_widths", options, x=rate / 100, line=line(width, kind))


def kinds(width: int) -> tuple[str, ...]:
    """The parametrisations of a width: at the base of muP they are one."""
    return (BASE,) if width == 100 else KINDS


def moves(kind: str) -> dict[str, float]:
    """Weights of: the slope over the rate of the widest models, minus that of the narrowest."""
    narrow, *_, wide = WIDTHS
    return {
        label(wide, kind, 400): 1.0,
        label(wide, kind, 100): -1.0,
        label(narrow, kind, 400): -1.0,
        label(narrow, kind, 100): 1.0,
    }


NARROW, *_, WIDE = WIDTHS

EXPERIMENT = Experiment(
    module="experiments.laws.widths",
    title="The best learning rate over widths, with and without muP",
    source="Tensor Programs V (arXiv 2203.03466), figure 1; muP for mixtures (2508.09752)",
    summary="In the standard parametrisation a wider model has a lower best learning rate. With muP"
    " the best rate of a narrow model is that of a wide one, for mixtures of experts too. (Widths"
    " and rates are relative to the scale's own; at width 1 both parametrisations are one.)",
    arms=tuple(arm(w, kind, rate) for w in WIDTHS for kind in kinds(w) for rate in RATES),
    claims=(
        Claim(
            "without muP a high rate hurts the widest more than the narrowest",
            moves(STANDARD),
            source=BOTH,
        ),
        Claim(
            "that difference is larger without muP than with it",
            {**moves(STANDARD), **{name: -weight for name, weight in moves(MUP).items()}},
            source=BOTH,
        ),
        larger_change(
            "from the tuned rate to four times that the widest loses more without muP",
            (label(WIDE, STANDARD, 100), label(WIDE, STANDARD, 400)),
            (label(WIDE, MUP, 100), label(WIDE, MUP, 400)),
            source=BOTH,
        ),
        below(label(WIDE, MUP, 100), label(WIDE, STANDARD, 100), source=BOTH),
        below(label(WIDE, MUP, 100), label(100, BASE, 100), source="2203.03466 section 7"),
    ),
    may_differ=("name", "model.", "optimizer.peak_learning_rate"),
    measures=("validation_loss", "validation_bits_per_byte", "total", "activated", "maxvio"),
    pictures=("panels_over_x",),
    x_axis="peak learning rate, relative to the scale's",
    x_scale="log",
    panels={kind: tuple(line(w, BASE if w == 100 else kind) for w in WIDTHS) for kind in KINDS},
    seeds={"smoke": 1, "demo": 1, "proxy": 1, "paper": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
