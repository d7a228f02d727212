"""The sub-model that a domain needs: its loss on the domain and off it.

    python -m experiments.v1.fig3 --scale=demo                # trains the models
    python -m experiments.surgery.extraction --scale=demo     # takes their experts

In each layer the experts stay that hold a share of the gates on the domain's training text; all
layers keep as many as the one that needs most.  The loss is that of the run's held-out text.
Beside it stands a sub-model with as many experts, those that hold most of the gates on all text: if
a domain has experts of its own, its own choice is better there.
"""

import functools

from dsmoe_jax.commands import experiment
from dsmoe_jax.study import fewer_experts
from dsmoe_jax.study.claims import Claim, below, bounded
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.surgery._models import GSHARD, MODELS, OURS

DOMAINS = {"code": "code_", "English": "en_"}  # how the names of their domains begin
SHARES = (0.5, 0.75, 0.9)
ASSIGNMENTS = "assignments"
ON = "rise_on"


def line(model: str, domain: str) -> str:
    """The sub-models of a model for a domain, by gates."""
    return f"{model}, {domain}"


COUNTED = f"{ASSIGNMENTS}, code"  # the line of DeepSeekMoE's for code, by assignments


def extracted(model: str, domain: str, share: float) -> ProbeArm:
    """The sub-model with the experts that hold a share of a domain's gates."""
    name = line(model, domain)
    return _arm(f"{name}, {share:g}", model, domain, share, name)


def counted(share: float) -> ProbeArm:
    """The same of DeepSeekMoE for code, with a share of the assignments."""
    return _arm(f"{OURS}, {COUNTED}, {share:g}", OURS, "code", share, COUNTED, gates=False)


def _arm(
    label: str, model: str, domain: str, share: float, name: str, *, gates: bool = True
) -> ProbeArm:
    trained = MODELS[model]
    probe = functools.partial(
        fewer_experts.extracted, domains=DOMAINS[domain], share=share, gates=gates
    )
    return ProbeArm(label, trained.experiment, trained.arm, x=share, line=name, probe=probe)


def of_its_own(model: str, domain: str) -> tuple[Claim, ...]:
    """Claims that the domain's sub-model is for the domain, at every share."""
    labels = [f"{line(model, domain)}, {share:g}" for share in SHARES]
    return (
        *(bounded(x, above=0, measure="off_over_on", source="2604.05267") for x in labels),
        *(bounded(x, above=0, measure="general_over_own", source="2604.05267") for x in labels),
    )


LINES = {domain: tuple(line(model, domain) for model in (GSHARD, OURS)) for domain in DOMAINS}
EXPERIMENT = Experiment(
    module="experiments.surgery.extraction",
    title="The sub-model that a domain needs",
    source="2604.05267; 2407.01906; DeepSeekMoE (arXiv 2401.06066), section 3",
    summary="Experts are said to belong to domains. Then those that hold a share of a domain's"
    " gates should serve it nearly as well as all, other text worse, and the domain better than as"
    " many experts that all text uses most. Finer experts should need a smaller part of the model"
    " for the same loss. Experts are chosen on training text, nothing is trained afterwards."
    " (Labels end in the share; the use is the sum of gates, or the number of assignments.)",
    arms=(
        *(
            extracted(model, domain, share)
            for model in (GSHARD, OURS)
            for domain in DOMAINS
            for share in SHARES
        ),
        *map(counted, SHARES),
    ),
    claims=(
        *(claim for model in (GSHARD, OURS) for d in DOMAINS for claim in of_its_own(model, d)),
        *(
            below(
                f"{line(OURS, domain)}, {share:g}",
                f"{line(GSHARD, domain)}, {share:g}",
                measure="parameters_left",
                source="V1 section 3.1",
            )
            for domain in DOMAINS
            for share in SHARES
        ),
    ),
    measures=(
        ON,
        "rise_off",
        "off_over_on",
        "general_over_own",
        "experts_left",
        "parameters_left",
        "validation_loss",
    ),
    pictures=("panels_over_x",),
    x_axis="share of the domain's gates that the experts hold",
    panels={
        "code": (*LINES["code"], COUNTED),
        "English": LINES["English"],
    },
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
