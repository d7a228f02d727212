"""The dense models of tasks, taken out of mixtures that are routed by task.

python -m experiments.surgery.task_routing --scale=demo    # trains the mixtures
python -m experiments.surgery.one_task --scale=demo        # measures what is taken out of them

The loss of "its dense models" is that of the held-out text with each domain read by the model of
its own task.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import Claim, below, bounded
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from dsmoe_jax.study.models_of_tasks import models_of_tasks
from dsmoe_jax.surgery.one_task import dense_config
from experiments.surgery import task_routing
from experiments.surgery.task_routing import DENSE, KUDUGUNTA, TABLE, TASK

GAP, RISE = "task_gap", "task_rise"


def taken_from(trained: str) -> str:
    """The label of the dense models of a mixture."""
    return f"{trained}: its dense models"


def whole(trained: str) -> ProbeArm:
    """A model as it was trained."""
    return ProbeArm(trained, task_routing.EXPERIMENT, trained)


def parts(trained: str) -> ProbeArm:
    """The dense models of a mixture's tasks."""
    return ProbeArm(
        taken_from(trained),
        task_routing.EXPERIMENT,
        trained,
        probe=models_of_tasks,
        becomes=dense_config,
    )


def preserved(trained: str) -> tuple[Claim, ...]:
    """Claims that nothing is lost on a task, whose model is smaller and only for that task."""
    label = taken_from(trained)
    return (
        # Float32 rounding; the loss has about four nats.
        bounded(label, below=1e-4, measure=GAP, source=KUDUGUNTA),
        below(label, trained, measure="total", source=KUDUGUNTA),
        bounded(label, above=0, measure=RISE, source="each task has parameters of its own"),
        below(label, DENSE, source=KUDUGUNTA),
    )


EXPERIMENT = Experiment(
    module="experiments.surgery.one_task",
    title="A mixture served as small dense models",
    source="Beyond Distillation: Task-level Mixture-of-Experts (2110.03742)",
    summary="The sub-network of a task keeps all of the mixture's gain over a dense model that"
    " costs as much to serve, by design, while distillation keeps a third of it.",
    arms=(whole(TASK), parts(TASK), whole(TABLE), parts(TABLE), whole(DENSE)),
    claims=(*preserved(TASK), *preserved(TABLE)),
    measures=("validation_loss", "validation_bits_per_byte", "total", "activated", GAP, RISE),
    pictures=("final_loss", "domains"),
    seeds={"smoke": 1, "demo": 2, "gpu": 1, "proxy": 1, "paper": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
