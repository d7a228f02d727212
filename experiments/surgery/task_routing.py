"""Experts chosen by the task of a document beside experts chosen for each token.

    python -m experiments.surgery.task_routing --scale=demo

A task is a language, code, or mathematics: the beginning of the domain's name.  Nine tasks have
seven experts each, as many as a token has, and 63 are as many as there are.  So by the table no two
tasks share an expert.  `one_task` measures what is taken out of these models.

The expert term is over the batch for the router by task: in a row of one task its load cannot be
even.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below, ratio_below
from dsmoe_jax.study.experiment import Arm, Equal, Experiment, same_total
from experiments.v1 import table1

# The beginnings of the domains' names in all corpora that come with the project.
TASKS = ("en", "de", "es", "nl", "zh", "code", "math", "dialogue", "unicode")
TOKEN, TASK, TABLE, DENSE = "DeepSeekMoE", "by task", "by a table of tasks", "dense, as activated"
KUDUGUNTA = "2110.03742"
BY_TASK = {"model.moe.router.name": "task", "model.moe.router.tasks": TASKS}
EVEN_OVER_BATCH = {"model.moe.balance.expert.scope": "global_batch"}
BY_TABLE = {**BY_TASK, "model.moe.router.name": "task_table", "model.moe.balance.expert": None}

EXPERIMENT = Experiment(
    module="experiments.surgery.task_routing",
    title="Experts for tokens, or for tasks",
    source="Beyond Distillation: Task-level Mixture-of-Experts (2110.03742)",
    summary="In translation a mixture that is routed by language pair is better than one that is"
    " routed by token, and is served as small dense models. (Here it is a language model, whose"
    " tasks are languages, code and mathematics; it reads the label of each document.)",
    arms=(
        table1.EXPERIMENT.arm(TOKEN),
        Arm(TASK, "dsmoe_2b", overrides={**BY_TASK, **EVEN_OVER_BATCH}),
        Arm(TABLE, "dsmoe_2b", overrides=BY_TABLE),
        # The width of a shared and seven routed experts: what a task's dense model has.
        Arm(DENSE, "dense_2b", overrides={"model.moe.n_shared_experts": 2}),
    ),
    equal=(
        *same_total(TOKEN, TASK, TABLE),
        Equal("activated", (TOKEN, TASK, TABLE, DENSE), 0.05),  # the router's matrix is 4 %
        Equal("expert_activated", (TOKEN, TASK, TABLE, DENSE), 0.001),
        Equal("flops_per_sequence", (TOKEN, TASK, TABLE, DENSE), 0.001),
    ),
    claims=(
        below(TASK, TOKEN, source=f"{KUDUGUNTA}, in translation"),
        # "Performs competitively", of its largest models, is read as within 1 %.
        ratio_below(TASK, TOKEN, 1.01, source=f"{KUDUGUNTA}, in translation"),
        ratio_below(TABLE, TOKEN, 1.01, source=f"{KUDUGUNTA}, there learned"),
        # "The gains" are those over a dense model that costs as much to serve.
        below(TASK, DENSE, source=KUDUGUNTA),
        below(TABLE, DENSE, source=f"{KUDUGUNTA}, there learned"),
    ),
    measures=(
        "validation_loss",
        "validation_bits_per_byte",
        "total",
        "activated",
        "maxvio",
        "dead_experts",
        "domain_specialisation",
    ),
    seeds={"smoke": 1, "demo": 2, "gpu": 1, "proxy": 1, "paper": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
