"""Does a dense student of DeepSeekMoE keep its gain over a dense model, and how much of it?

    python -m experiments.v1.table1 --scale=demo              # trains the teachers
    python -m experiments.surgery.distillation --scale=demo

Students are the dense model of table 1, trained on the same text in the same order; the teacher of
a seed is the DeepSeekMoE of that seed.  The first student weighs the teacher as Switch Transformers
do (2101.03961, section 4.2), the second one the text less, as Hinton et al. advise (1503.02531),
the third one is also drawn to the teacher's last hidden states.  All temperatures are 1.  Switch's
student also begins with the teacher's weights outside of the experts; these begin at random.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import Claim, below, keeps
from dsmoe_jax.study.experiment import Arm, Experiment, FinishedRun, Gain, same_activated
from experiments.v1 import table1

DENSE, MIXTURE = "Dense", "DeepSeekMoE"
LITTLE, MUCH, HIDDEN = "1/4 teacher", "3/4 teacher", "hidden states too"
STUDENTS = (LITTLE, MUCH, HIDDEN)
GAIN = Gain(DENSE, MIXTURE)
SECTION = "train.distillation."
TEACHER = {f"{SECTION}teacher": FinishedRun(table1.EXPERIMENT, MIXTURE)}
SOURCE = "slides on mixtures of experts"


def student(label: str, **settings: float) -> Arm:
    """The dense model with a teacher, and settings of the section `train.distillation`."""
    overrides = {SECTION + key: value for key, value in settings.items()}
    return Arm(label, "dense_2b", overrides=overrides, from_runs=TEACHER)


def kept(label: str) -> tuple[Claim, ...]:
    """Claims that a student keeps 30 to 40 % of the gain."""
    return (
        keeps(label, GAIN, at_least=0.3, source=SOURCE),
        keeps(label, GAIN, at_most=0.4, source=SOURCE),
    )


EXPERIMENT = Experiment(
    module="experiments.surgery.distillation",
    title="A dense student of DeepSeekMoE",
    source="slides on mixtures of experts; Switch Transformers (arXiv 2101.03961), section 4.2",
    summary="A dense model that learns from a mixture's predictions beside the text is said to keep"
    " 30 to 40 % of what the mixture gains over the same dense model on the text alone. (1/4"
    " teacher: a quarter of the loss is the divergence from the teacher's predictions, the rest is"
    " that of the text. FLOPs do not count the forward passes of the teacher; the total has its"
    " training.)",
    arms=(
        Arm(DENSE, "dense_2b"),
        student(LITTLE, factor=0.25),
        student(MUCH, factor=0.75),
        student(HIDDEN, factor=0.25, hidden_factor=0.1),
        Arm(MIXTURE, "dsmoe_2b"),
    ),
    equal=same_activated(DENSE, *STUDENTS),
    claims=(
        *(below(label, DENSE, source=SOURCE) for label in STUDENTS),
        below(MIXTURE, DENSE),
        *kept(LITTLE),
        *kept(MUCH),
    ),
    may_differ=("name", "model.moe.", SECTION),
    measures=(
        "validation_loss",
        "validation_bits_per_byte",
        "teacher_agreement",
        "total",
        "activated",
        "training_flops",
        "total_training_flops",
    ),
    pictures=("final_loss", "learning_curves", "domains"),
    analyses=("kept_shares",),
    gain=GAIN,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
