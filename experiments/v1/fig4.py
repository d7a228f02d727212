"""Masking the best-ranked routed experts of every token (V1 figure 4).

    python -m experiments.v1.table2 --scale=demo    # trains the models
    python -m experiments.v1.fig4 --scale=demo      # measures them

The same share of experts is masked in DeepSeekMoE and in a GShard of the same loss.  The loss rises
more where experts are less redundant.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.study.claims import Claim, larger_change
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.v1 import table2

SIXTEENTHS = range(5)
N_EXPERTS = {"GShard x1.5": 16, "DeepSeekMoE": 64}  # with the shared one, as the paper cuts them


def masked(trained: str, sixteenths: int) -> ProbeArm:
    """Probe of a model with `sixteenths` / 16 of its experts masked, the best of each token."""
    mask = Intervention(mask_best=sixteenths * N_EXPERTS[trained] // 16)
    label = f"{trained}, {sixteenths}/16"
    return ProbeArm(label, table2.EXPERIMENT, trained, mask, x=sixteenths / 16)


def hurt_more(sixteenths: int) -> Claim:
    """Claim that the mask raises DeepSeekMoE's loss by more than GShard's."""
    text = f"without {sixteenths}/16 DeepSeekMoE loses more than GShard x1.5"
    ours = ("DeepSeekMoE, 0/16", f"DeepSeekMoE, {sixteenths}/16")
    theirs = ("GShard x1.5, 0/16", f"GShard x1.5, {sixteenths}/16")
    return larger_change(text, ours, theirs, source="figure 4")


EXPERIMENT = Experiment(
    module="experiments.v1.fig4",
    title="Without the best routed experts",
    source="DeepSeekMoE (arXiv 2401.06066), figure 4",
    summary="Masking the routed experts that a token wants most hurts DeepSeekMoE more than a"
    " GShard of the same loss: its routed experts are less redundant.",
    arms=tuple(masked(trained, n) for trained in N_EXPERTS for n in SIXTEENTHS),
    claims=tuple(hurt_more(n) for n in SIXTEENTHS if n),
    measures=("validation_loss", "validation_bits_per_byte", "maxvio", "dead_experts"),
    pictures=("over_x", "final_loss", "domains", "expert_load"),
    x_axis="share of the experts masked, the best of each token",
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
