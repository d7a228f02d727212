"""Experts of 8 bits and fewer, without any training.

    python -m experiments.v1.table1 --scale=demo            # trains the models
    python -m experiments.surgery.int8_experts --scale=demo # measures them

The weights of routed and shared experts get a scale for each output; attention, embedding, head and
router stay float32.  With 16-bit gates the router's logits and gates are bfloat16; with INT8
activations the inputs of each product are rounded too, and the sums are of whole numbers.
"""

import functools

from dsmoe_jax.commands import experiment
from dsmoe_jax.study import quantised
from dsmoe_jax.study.claims import Claim, bounded, ratio_below
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.v1 import table1

MODELS = ("DeepSeekMoE", "GShard")
BITS = (6, 4, 3, 2)
SOURCE = "16-bit gates with INT8 experts lose little"
INT8 = "{}, INT8"
GATES = "{}, INT8, 16-bit gates"
ACTIVATIONS = "{}, INT8, INT8 activations"


def probe(label: str, model: str, x: float, bits: int | None, **options: object) -> ProbeArm:
    """A trained model with experts of some bits."""
    look = functools.partial(quantised.quantised, bits=bits, **options)
    return ProbeArm(label, table1.EXPERIMENT, model, x=x, probe=look)


def arms_of(model: str) -> tuple[ProbeArm, ...]:
    """A model as it was trained, and with fewer and fewer bits."""
    return (
        probe(model, model, 32, None),
        probe(INT8.format(model), model, 8, 8),
        probe(GATES.format(model), model, 8, 8, gates="bfloat16"),
        probe(ACTIVATIONS.format(model), model, 8, 8, activations=True),
        *(probe(f"{model}, {bits} bits", model, bits, bits) for bits in BITS),
    )


def claims_of(model: str) -> tuple[Claim, ...]:
    """Claims that little is lost: half a per cent of the loss, and one choice in twenty."""
    labels = [label.format(model) for label in (INT8, GATES, ACTIVATIONS)]
    return (
        *(ratio_below(label, model, 1.005, source=SOURCE) for label in labels),
        *(bounded(label, above=95, measure="routing_agreement", source=SOURCE) for label in labels),
    )


EXPERIMENT = Experiment(
    module="experiments.surgery.int8_experts",
    title="Experts of eight bits",
    source="a survey of mixtures: 16-bit gates with INT8 experts",
    summary="Experts are most of a model's bytes, so they are stored in 8 bits; the router, which"
    " decides between near ties, keeps 16. The loss is said to rise little. It is"
    " measured on models as they were trained, without calibration or further training, down to the"
    " bits at which it breaks. Little is read as below 1.005 times the loss, with 95 % of the"
    " choices the same. Fewer than 8 bits take a byte here all the same.",
    arms=(*arms_of("DeepSeekMoE"), *arms_of("GShard")),
    claims=(*claims_of("DeepSeekMoE"), *claims_of("GShard")),
    measures=(
        "validation_loss",
        "validation_bits_per_byte",
        "routing_agreement",
        "expert_megabytes",
        "weight_megabytes",
        "maxvio",
    ),
    pictures=("over_x", "final_loss"),
    x_axis="bits of an expert's weight",
    x_scale="log",
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
