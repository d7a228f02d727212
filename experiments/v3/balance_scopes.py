"""The balance loss over a sequence, over the batch, or none: a bias, V3's recipe, nothing.

    python -m experiments.v3.balance_scopes --scale=demo

A loss over each sequence forces every text to use all experts; over the batch, or with a bias on
the choice, experts may serve a domain: the domain specialisation is a column.  The single means are
arms of experiments/balancing/balance.py, V3's recipe is that of balanced_routers.py.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import below, bounded
from dsmoe_jax.study.experiment import Experiment, same_activated, same_total
from experiments.balancing import balance, balanced_routers
from experiments.laws import sizes

SINGLE = ("expert loss", "global loss", "loss-free bias", "nothing")
SEQUENCE, GLOBAL, BIAS, NOTHING = SINGLE
ARMS = (
    *(balance.EXPERIMENT.arm(label) for label in SINGLE),
    balanced_routers.EXPERIMENT.arm("V3"),
)
LABELS = tuple(arm.label for arm in ARMS)

EXPERIMENT = Experiment(
    module="experiments.v3.balance_scopes",
    title="Balance over a sequence or over the batch",
    source="DeepSeek-V3 (arXiv 2412.19437), section 4.5.3; 2501.11873; 2408.15664, table 2",
    summary="A balance loss over the batch and the bias without a loss give a lower loss than a"
    " balance loss over each sequence, and let experts specialise by domain. (Expert loss: over"
    " each sequence; global loss: over the batch.)",
    arms=ARMS,
    equal=(*same_total(*LABELS), *same_activated(*LABELS)),
    claims=(
        # The 1B models of V3: 2.258 over a sequence, 2.253 over the batch and with the bias.
        below(GLOBAL, SEQUENCE, source="V3 section 4.5.3", paper=0.005),
        below(BIAS, SEQUENCE, source="V3 section 4.5.3", paper=0.005),
        # The 1B models there: 0.72 with the loss, 0.04 with the bias.
        below(BIAS, SEQUENCE, measure="maxvio", source="2408.15664 table 2", paper=0.68),
        # Its "micro-batch" of few sequences is here a single one.
        below(SEQUENCE, GLOBAL, measure="domain_specialisation", source="2501.11873"),
        below(SEQUENCE, BIAS, measure="domain_specialisation", source="V3 section 4.5.3"),
        # "Not by language" is read as less than by kind of text.
        bounded(SEQUENCE, below=0, measure="language_over_kind", source="slides on mixtures"),
    ),
    measures=(
        "validation_loss",
        "validation_bits_per_byte",
        "domain_specialisation",
        "language_specialisation",
        "kind_specialisation",
        "maxvio",
        "maxvio_running",
        "dead_experts",
    ),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
