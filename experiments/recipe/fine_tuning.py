"""Fine-tuning a trained DeepSeekMoE on small tasks: all of it, the dense part, the experts alone.

A dense model, all of it, is beside them: do mixtures overfit more?

    python -m experiments.recipe.fine_tuning --scale=demo

Each run begins with the DeepSeekMoE, or the dense model, of `experiments.v1.table1` of the same
scale and seed, which have to be trained before.  With --arms=everything,dense_part,experts
--set=train.start_from=RUN --set=data.tokenizer=RUN/tokenizer.json the mixtures begin with the
workdir RUN of another `dsmoe_2b` of the scale.

The loss is of the answers alone, the rate constant and conversations are packed as densely as
possible, as in V1 section 6.1.  The rate is a tenth of the scale's; V1's 1e-5 is 1/42 of the
highest rate that the 16B was trained with.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.runs import workdir
from dsmoe_jax.study.claims import below
from dsmoe_jax.study.experiment import Arm, Experiment, FinishedRun
from experiments.v1 import table1

MIXTURE = "DeepSeekMoE"
SETTINGS = {
    "data.corpus": "tasks",
    "data.domains": None,
    "train.steps": 100,
    "train.eval_every": 25,
    "train.eval_batches": None,
    "train.log_every": 5,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}
GAP = "generalisation_gap"
LECTURE = "a lecture's notes on mixtures of experts"


def _arm(label: str, part: str = "all", config: str = "dsmoe_2b", trained: str = MIXTURE) -> Arm:
    return Arm(
        label,
        config,
        overrides={**SETTINGS, "train.trainable.part": part},
        multiples={"optimizer.peak_learning_rate": 0.1},
        from_runs={
            "train.start_from": FinishedRun(table1.EXPERIMENT, trained),
            "data.tokenizer": FinishedRun(table1.EXPERIMENT, MIXTURE, file=workdir.TOKENIZER),
        },
    )


EXPERIMENT = Experiment(
    module="experiments.recipe.fine_tuning",
    title="Fine-tuning all of a model, or a part of it",
    source="ST-MoE (2202.08906); ESFT (2407.01906)",
    summary="ST-MoE: fine-tuning all but the experts and the router is about as good as fine-tuning"
    " everything. ESFT: so is fine-tuning the experts that a task uses. A mixture overfits more"
    " than a dense model.",
    arms=(
        _arm("everything"),
        _arm("dense part", "dense_part"),
        _arm("experts", "experts"),
        _arm("dense model", config="dense_2b", trained="Dense"),
    ),
    may_differ=("name", "model.", "train.start_from", "train.trainable."),
    claims=(
        below("dense model", "everything", measure=GAP, source=LECTURE),
        below("dense part", "everything", measure=GAP, source=LECTURE),
        below("dense part", "everything", source=LECTURE),
    ),
    measures=(
        "validation_loss",
        "validation_loss_before",
        GAP,
        "validation_bits_per_byte",
        "maxvio",
    ),
    seeds={"smoke": 1, "demo": 2, "gpu": 1, "proxy": 1, "paper": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
