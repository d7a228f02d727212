"""Is there a committee of routed experts that serves every domain?

    python -m experiments.v1.fig3 --scale=demo                # these train the models
    python -m experiments.v1.shared_ratio --scale=demo
    python -m experiments.v3.balance_scopes --scale=demo
    python -m experiments.inside.committees --scale=demo      # looks inside

A committee is the smallest set of experts with half of the sum of all gates, of all text or of one
domain.  2601.03425 finds that few experts take most of the routing mass in every domain, shared
experts or not; 2604.05267 finds the opposite.  Here both are asked of the same models, and whether
such a core shrinks with more shared experts, with balance over the batch, or with a bias alone.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study import probes
from dsmoe_jax.study.claims import below, bounded
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.v1 import fig3, shared_ratio
from experiments.v3 import balance_scopes

GSHARD, ONE, FINE = "0 + 16 (2)", "1 + 15 (1)", "1 + 63 (7)"
TWO, FOUR = "2 + 62 (6)", "4 + 60 (4)"


def look(label: str, trained_by: Experiment, trained: str) -> ProbeArm:
    """A model as it was trained, looked at inside."""
    return ProbeArm(label, trained_by, trained, probe=probes.inside)


ARMS = (
    look(GSHARD, fig3.EXPERIMENT, GSHARD),
    look(ONE, fig3.EXPERIMENT, ONE),
    look(FINE, fig3.EXPERIMENT, FINE),
    look(TWO, shared_ratio.EXPERIMENT, TWO),
    look(FOUR, shared_ratio.EXPERIMENT, FOUR),
    look("global loss", balance_scopes.EXPERIMENT, balance_scopes.GLOBAL),
    look("loss-free bias", balance_scopes.EXPERIMENT, balance_scopes.BIAS),
    look("no balance", balance_scopes.EXPERIMENT, balance_scopes.NOTHING),
)
INVARIANT = "invariant_mass"
OVERLAP = "committee_over_chance"

EXPERIMENT = Experiment(
    module="experiments.inside.committees",
    title="A committee that serves every domain?",
    source="2601.03425 against 2604.05267; DeepSeekMoE (arXiv 2401.06066), section 3.2",
    summary="Shared experts are isolated to hold what all text needs. A few routed experts are said"
    " to take most of the routing mass in every domain all the same. (Arms read: shared + routed"
    " experts, routed ones activated; the last three are 1 + 63 (7) with another balance.)",
    arms=ARMS,
    claims=(
        # "Most of the routing mass" is read as half of the gates.
        bounded(FINE, above=50, measure=INVARIANT, source="2601.03425"),
        bounded(FINE, below=50, measure=INVARIANT, source="2604.05267"),
        # Isolated experts should leave less to share for the routed ones.
        below(ONE, GSHARD, measure=OVERLAP, source="V1 section 3.2"),
        below(TWO, FINE, measure=OVERLAP, source="V1 section 3.2"),
        below(FOUR, TWO, measure=OVERLAP, source="V1 section 3.2"),
        # A loss over each sequence asks every text to use all experts.
        below("global loss", FINE, measure=OVERLAP, source="2501.11873"),
        below("loss-free bias", FINE, measure=OVERLAP, source="2408.15664"),
    ),
    measures=(
        OVERLAP,
        "committee_overlap",
        "committee",
        INVARIANT,
        "domain_specialisation",
        "vocabulary_specialisation",
        "maxvio",
        "validation_loss",
    ),
    pictures=(OVERLAP, "committee", "domain_load"),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
