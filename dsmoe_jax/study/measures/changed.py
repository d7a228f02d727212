"""Measures of a model that was changed: experts masked, merged, left out or quantised."""

from __future__ import annotations

from dsmoe_jax.study import readings
from dsmoe_jax.study.measures.measure import Measure

CHANGED: dict[str, Measure] = {
    "masked_rise": Measure(
        "rise without each token's best",
        readings.inside("masked_rise"),
        "nats per token",
        digits=4,
        note="Rises: of the loss, on a fifth of the held-out text. Each token's best: its best"
        " sixteenth of the experts is masked (V1 figure 4).",
    ),
    "random_rise": Measure(
        "rise without a random sixteenth",
        readings.inside("random_rises"),
        "nats per token",
        digits=4,
        note="A random sixteenth: of every layer's experts, for all tokens, mean of 8 draws.",
    ),
    "least_rise": Measure(
        "rise without the least missed",
        readings.inside("least_rise"),
        "nats per token",
        digits=4,
        note="The least missed: a sixteenth of every layer, chosen on other text.",
    ),
    "sixteenth_rise": Measure(
        "rise without a sixteenth of a layer",
        readings.inside("sixteenth_rises"),
        "nats per token",
        digits=4,
        note="A sixteenth of a layer, one expert: mean over the sixteenths of all layers, or over"
        " up to 16 experts of each from the least loaded to the most, on 1/40 of the text.",
    ),
    "single_rise": Measure(
        "rise without one expert",
        readings.inside("single_rises"),
        "nats per token",
        digits=4,
    ),
    "task_gap": Measure(
        "largest difference from the mixture on a task",
        readings.largest("task_gap"),
        "nats per token",
        digits=6,
        lower_is_better=True,
        spread=False,
        note="Largest difference from the mixture: of the loss on a domain, by the dense model of"
        " its task.",
    ),
    "task_rise": Measure(
        "rise on other tasks",
        readings.inside("task_rise"),
        "nats per token",
        note="Rise on other tasks: of the loss on the text of all other tasks, by the dense model"
        " of one in place of the mixture; mean over tasks.",
    ),
    "rise": Measure(
        "rise of the loss",
        readings.over_trained,
        "nats per token",
        digits=4,
        lower_is_better=True,
        note="Rise: the loss on the held-out text less that of the model as it was trained.",
    ),
    "rise_percent": Measure(
        "rise in % of the loss",
        readings.percent_over_trained,
        "%",
        digits=2,
        lower_is_better=True,
    ),
    "experts_left": Measure(
        "routed experts left", readings.inside("experts_left"), "%", digits=1, spread=False
    ),
    "parameters_left": Measure(
        "parameters left", readings.inside("parameters_left"), "%", digits=1, spread=False
    ),
    "most_alike": Measure(
        "likeness of the most alike two",
        readings.inside("most_alike"),
        lower_is_better=True,
        note="The most alike two: experts of a layer of the whole model, in all layers.",
    ),
    "rise_on": Measure(
        "rise on the domain",
        readings.part_over_trained(on=True),
        "nats per token",
        digits=4,
        lower_is_better=True,
        note="Rises on the domain's text, and off it, on the rest of the held-out text.",
    ),
    "rise_off": Measure(
        "rise off the domain",
        readings.part_over_trained(on=False),
        "nats per token",
        digits=4,
    ),
    "off_over_on": Measure(
        "rise off the domain less that on it", readings.off_over_on, "nats per token", digits=4
    ),
    "general_over_own": Measure(
        "gain of the domain's own choice",
        readings.general_over_own,
        "nats per token",
        digits=4,
        note="Gain of the own choice: the loss on the domain with as many experts that all text"
        " uses most, less that with those that the domain uses most.",
    ),
    "routing_agreement": Measure(
        "routing agreement",
        readings.inside("routing_agreement", 100),
        "%",
        digits=2,
        lower_is_better=False,
        note="Routing agreement: share of the experts chosen by the model as it was trained that"
        " are chosen for the same token; on a fifth of the held-out text, mean over layers.",
    ),
    "expert_megabytes": Measure(
        "megabytes of the experts",
        readings.inside("expert_bytes", 1e-6),
        "MB",
        digits=2,
        lower_is_better=True,
        spread=False,
        note="Megabytes: as they are stored; what is not quantised is float32.",
    ),
    "weight_megabytes": Measure(
        "megabytes of all weights",
        readings.inside("weight_bytes", 1e-6),
        "MB",
        digits=2,
        lower_is_better=True,
        spread=False,
    ),
}
