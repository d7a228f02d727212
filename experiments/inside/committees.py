"""Is there a committee of routed experts that serves every domain?

    python -m experiments.v1.fig3 --scale=demo                # these train the models
    python -m experiments.v1.shared_ratio --scale=demo
    python -m experiments.v3.balance_scopes --scale=demo
    python -m experiments.inside.committees --scale=demo      # looks inside

2601.03425 finds a standing committee: few routed experts that take most of the routing mass in
every domain, shared experts or not.  2604.05267 finds experts of single domains.  These are three
questions, and a model may answer yes to each:

    are few experts enough for half of the gates of every domain?   the standing committee is small
    do two domains use the same experts most?                       invariance of the committees
    has some domain experts of its own?                             experts of a domain

The null model is the same text with the domains of its sequences shuffled: routing with the same
loads for which domains make no difference.  Balance holds the first down whatever domains do (with
even gates half of them is half of the experts), so the other two are read against the null model.
A second one asks whether experts of a domain know more than its tokens: each token gets the mean
gates of all tokens of its id.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study import probes
from dsmoe_jax.study.claims import Claim, below, bounded
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.v1 import fig3, shared_ratio
from experiments.v3 import balance_scopes

GSHARD, ONE, FINE = "0 + 16 (2)", "1 + 15 (1)", "1 + 63 (7)"
TWO, FOUR = "2 + 62 (6)", "4 + 60 (4)"
GLOBAL, BIAS, NOTHING = "global loss", "loss-free bias", "no balance"


def look(label: str, trained_by: Experiment, trained: str) -> ProbeArm:
    """A model as it was trained, looked at inside."""
    return ProbeArm(label, trained_by, trained, probe=probes.inside)


ARMS = (
    look(GSHARD, fig3.EXPERIMENT, GSHARD),
    look(ONE, fig3.EXPERIMENT, ONE),
    look(FINE, fig3.EXPERIMENT, FINE),
    look(TWO, shared_ratio.EXPERIMENT, TWO),
    look(FOUR, shared_ratio.EXPERIMENT, FOUR),
    look(GLOBAL, balance_scopes.EXPERIMENT, balance_scopes.GLOBAL),
    look(BIAS, balance_scopes.EXPERIMENT, balance_scopes.BIAS),
    look(NOTHING, balance_scopes.EXPERIMENT, balance_scopes.NOTHING),
)
STANDING = "standing_committee"
INVARIANCE = "invariance"
SPECIFIC = "specific_over_blind"
BEYOND_TOKENS = "specific_over_token"


def weaker(one: str, other: str, source: str) -> tuple[Claim, ...]:
    """Claims that the standing committee of a model is weaker than that of another.

    It needs more experts, and the domains' committees have less in common.
    """
    return (
        below(other, one, measure=STANDING, source=source),
        below(one, other, measure=INVARIANCE, source=source),
    )


EXPERIMENT = Experiment(
    module="experiments.inside.committees",
    title="A committee that serves every domain?",
    source="2601.03425 against 2604.05267; DeepSeekMoE (arXiv 2401.06066), section 3.2",
    summary="Shared experts are isolated to hold what all text needs. A few routed experts are said"
    " to take most of the routing mass in every domain all the same; elsewhere, domains are said to"
    " have experts of their own. A small committee is read as a quarter of the experts with half of"
    " the gates of every domain; the same for all domains, as nearer to routing for which domains"
    " make no difference than to chance; experts of a domain, as a tenth of the experts more than"
    " such routing has, or than there would be if the token alone decided. More shared experts,"
    " balance over the batch and a bias alone should weaken the committee. (Arms read: shared +"
    " routed experts, routed ones activated; the last three are 1 + 63 (7) with another balance.)",
    arms=ARMS,
    claims=(
        # "Compact": with even gates half of the experts would be needed.
        bounded(FINE, below=25, measure=STANDING, source="2601.03425"),
        bounded(FINE, above=50, measure=INVARIANCE, source="2601.03425"),
        # It calls the committee what models tend to, and balance losses what works against it.
        bounded(NOTHING, below=25, measure=STANDING, source="2601.03425"),
        bounded(NOTHING, above=50, measure=INVARIANCE, source="2601.03425"),
        below(NOTHING, FINE, measure=STANDING, source="2601.03425"),
        bounded(FINE, above=10, measure=SPECIFIC, source="2604.05267"),
        bounded(NOTHING, above=10, measure=SPECIFIC, source="2604.05267"),
        bounded(FINE, above=10, measure=BEYOND_TOKENS, source="2604.05267, more strictly"),
        # Isolated experts should leave less to share for the routed ones.
        *weaker(ONE, GSHARD, "V1 section 3.2"),
        *weaker(TWO, FINE, "V1 section 3.2"),
        *weaker(FOUR, TWO, "V1 section 3.2"),
        # A loss over each sequence asks every text to use all experts.
        *weaker(GLOBAL, FINE, "2501.11873"),
        *weaker(BIAS, FINE, "2408.15664"),
    ),
    measures=(
        STANDING,
        "standing_if_blind",
        INVARIANCE,
        "committee_overlap",
        "overlap_if_blind",
        SPECIFIC,
        BEYOND_TOKENS,
        "maxvio",
        "validation_loss",
    ),
    pictures=(STANDING, INVARIANCE, SPECIFIC, BEYOND_TOKENS),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
