"""Measures: numbers by which runs are compared.

A new one is a function in readings.py and an entry in `MEASURES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from dsmoe_jax.study import readings
from dsmoe_jax.study.readings import Outcome, sizes

# The tables of a report that have a column for each of their measures.
RESULTS, LOAD = "results", "load"


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
      title: for running text.
      read: returns the number; None where it does not exist or is not known yet.
      unit: of the number; "" where it has none.
      columns: table that has it as a column -> its heading there.
      digits: decimals; None is three digits and a unit, such as 5.66M.
      lower_is_better: None where neither is better.
      spread: whether tables show the standard deviation over seeds.
      from_config: whether it follows from the config alone and is known before training.
      note: a sentence below the results table.
    """

    title: str
    read: Callable[[Outcome], float | None]
    unit: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digits: int | None = 3
    lower_is_better: bool | None = None
    spread: bool = True
    from_config: bool = False
    note: str = ""

    @property
    def label(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def better(self) -> str:
        """The better direction, in words; "" where neither is."""
        words = {True: "lower is better", False: "higher is better", None: ""}
        return words[self.lower_is_better]


def _size(key: str, title: str, heading: str = "", note: str = "") -> Measure:
    """A measure that follows from the config: one of `sizes`."""
    return Measure(
        title,
        lambda outcome: sizes(outcome.measured)[key],
        columns={RESULTS: heading} if heading else {},
        digits=None,
        spread=False,
        from_config=True,
        note=note,
    )


RUNNING = "maxvio_running"  # the key in metrics.jsonl: load of the last 100 steps or so

# In the order of the columns of a table.
MEASURES: dict[str, Measure] = {
    "validation_loss": Measure(
        "validation loss",
        readings.held_out("loss"),
        "nats per token",
        columns={RESULTS: "validation loss"},
        lower_is_better=True,
        note="Loss in nats per token on held-out text.",
    ),
    "validation_loss_before": Measure(
        "validation loss before",
        readings.loss_before,
        "nats per token",
        lower_is_better=True,
        spread=False,
        note="Before: the loss of the parameters that the run began with.",
    ),
    "generalisation_gap": Measure(
        "generalisation gap",
        readings.generalisation_gap,
        "nats per token",
        lower_is_better=True,
        note="Generalisation gap: how far the held-out loss at the end is above the training loss"
        " of the last fifth of the logged steps; overfitting, where text is read again and again.",
    ),
    "validation_bits_per_byte": Measure(  # compares between tokenizers
        "validation bits per byte",
        readings.held_out("bits_per_byte"),
        columns={RESULTS: "bits / byte"},
        lower_is_better=True,
    ),
    "total": _size("total", "total parameters", "parameters"),
    "activated": _size("activated", "activated parameters", "activated"),
    "expert_total": _size("expert_total", "expert parameters"),
    "expert_activated": _size("expert_activated", "activated expert parameters"),
    "flops_per_sequence": _size(
        "flops_per_sequence",
        "FLOPs per sequence",
        "FLOPs / sequence",
        "FLOPs: training, as the paper counts.",
    ),
    "tokens": Measure(
        "tokens trained on", readings.tokens, columns={RESULTS: "tokens"}, digits=None, spread=False
    ),
    "flops_before": Measure(
        "training FLOPs before",
        readings.flops_before,
        digits=None,
        spread=False,
        from_config=True,
    ),
    "training_flops": Measure(
        "training FLOPs",
        lambda outcome: readings.training_flops(outcome.config),
        digits=None,
        spread=False,
        from_config=True,
    ),
    "total_training_flops": Measure(
        "training FLOPs in all",
        readings.total_training_flops,
        digits=None,
        spread=False,
        from_config=True,
        note="Training FLOPs: as the paper counts; before: of the model that the run begins with,"
        " or learns from; in all: both.",
    ),
    "validation_tokens": Measure("tokens judged on", readings.held_out("tokens"), digits=None),
    "maxvio": Measure(
        "MaxVio on held-out text",
        readings.held_out("maxvio", np.mean),
        columns={RESULTS: "MaxVio"},
        digits=2,
        lower_is_better=True,
        spread=False,
        note="MaxVio: how far the load of the most loaded expert is above the mean, relative to"
        " it, on the held-out text; mean over layers.",
    ),
    "maxvio_highest": Measure(
        "highest MaxVio of a batch",
        readings.logged("maxvio", np.mean, np.max),
        columns={LOAD: "MaxVio of a batch: highest"},
        digits=1,
        lower_is_better=True,
    ),
    "maxvio_last_fifth": Measure(
        "MaxVio of a batch in the last fifth of the steps",
        readings.logged("maxvio", np.mean, readings.mean_of_last_fifth),
        columns={LOAD: "in the last fifth"},
        digits=2,
        lower_is_better=True,
    ),
    "maxvio_running": Measure(
        "MaxVio over the last 100 steps",
        readings.logged(RUNNING, np.mean, readings.last),
        columns={RESULTS: "in training", LOAD: "over the window, at the end"},
        digits=2,
        lower_is_better=True,
        note="In training: MaxVio of the load of the last 100 steps or so.",
    ),
    "maxvio_running_worst": Measure(
        "MaxVio over the last 100 steps in the worst layer",
        readings.logged(RUNNING, np.max, readings.last),
        columns={LOAD: "its worst layer"},
        digits=2,
        lower_is_better=True,
    ),
    "dead_experts": Measure(
        "dead experts on held-out text",
        readings.held_out("dead_experts", np.sum),
        columns={RESULTS: "dead experts"},
        digits=None,
        lower_is_better=True,
        spread=False,
        note="Dead experts: those of all layers without a token of the held-out text.",
    ),
    "dead_experts_highest": Measure(
        "most dead experts in a batch",
        readings.logged("dead_experts", np.sum, np.max),
        columns={LOAD: "dead experts in a batch: most"},
        digits=0,
        lower_is_better=True,
    ),
    "dead_experts_last": Measure(
        "dead experts in the last batch",
        readings.logged("dead_experts", np.sum, readings.last),
        columns={LOAD: "at the end"},
        digits=0,
        lower_is_better=True,
    ),
    "domain_specialisation": Measure(
        "domain specialisation",
        readings.held_out("domain_specialisation", np.mean),  # see runs/summaries.py
        note="Domain specialisation: how much a chosen expert says about the domain of its token on"
        " the held-out text: 0 where all domains use the same experts, 1 where every expert serves"
        " one domain; mean over layers.",
    ),
    "language_specialisation": Measure(
        "specialisation by language",
        readings.by_language,
        note="Specialisation by language: the domain specialisation between languages, of the kind"
        " of text that most languages have.",
    ),
    "kind_specialisation": Measure(
        "specialisation by kind of text",
        readings.by_kind,
        note="Specialisation by kind of text: the domain specialisation between kinds of text, in"
        " the language that has most kinds.",
    ),
    "language_over_kind": Measure(
        "specialisation by language over that by kind of text", readings.language_over_kind
    ),
    "vocabulary_specialisation": Measure(
        "vocabulary specialisation",
        readings.inside("vocabulary_specialisation"),
        note="Vocabulary specialisation: the largest share of one expert in the occurrences of a"
        " token id, mean over ids that occur often enough, and over layers.",
    ),
    "committee": Measure(
        "committee of half the gates",
        readings.inside("committee", 100),
        "% of the experts",
        digits=1,
        note="Committee: the smallest set of experts with half of the sum of all gates; mean over"
        " layers.",
    ),
    "committee_overlap": Measure(
        "overlap of the domains' committees",
        readings.inside("committee_overlap"),
        note="Overlap: Jaccard index of two domains' committees, mean over pairs and layers.",
    ),
    "overlap_if_blind": Measure(
        "overlap of blind committees",
        readings.inside("overlap_if_blind"),
        note="Blind: if domains made no difference, with the domains of the sequences shuffled,"
        " which leaves the loads as they are; mean over 20 shuffles.",
    ),
    "invariance": Measure(
        "invariance of the committees",
        readings.invariance,
        "%",
        digits=1,
        note="Invariance: 0 where two domains' committees overlap as random sets of the same sizes"
        " do, 100 where they overlap as blind ones.",
    ),
    "standing_committee": Measure(
        "standing committee",
        readings.inside("standing_committee", 100),
        "% of the experts",
        digits=1,
        note="Standing committee: few experts that hold half of the gates in every domain; if all"
        " experts had equal gates, 50 %.",
    ),
    "standing_if_blind": Measure(
        "blind standing committee",
        readings.inside("standing_if_blind", 100),
        "% of the experts",
        digits=1,
    ),
    "specific_over_blind": Measure(
        "experts of a domain over blind",
        readings.specific_over("specific_if_blind"),
        "points of %",
        digits=1,
        note="Experts of a domain: with at least twice their mean share of the gates in one.",
    ),
    "specific_over_token": Measure(
        "experts of a domain over tokens",
        readings.specific_over("specific_by_token"),
        "points of %",
        digits=1,
        note="Over blind, over tokens: less those that there would be if domains made no"
        " difference, or if the token alone decided, each with the mean gates of all of its id.",
    ),
    "experts_per_token": Measure(
        "effective experts of a token",
        readings.inside("experts_per_token"),
        digits=2,
        note="Effective experts of a token: exp of the entropy of its gates, divided by their sum.",
    ),
    "weights_alike": Measure(
        "likeness of two experts' weights", readings.inside("weights_alike"), lower_is_better=True
    ),
    "outputs_alike": Measure(
        "likeness of two experts' outputs",
        readings.inside("outputs_alike"),
        lower_is_better=True,
        note="Likeness: mean cosine over pairs of experts; of outputs, for the same tokens.",
    ),
    "outputs_cka": Measure(
        "CKA of outputs over start",
        readings.over_before("outputs_cka"),
        lower_is_better=True,
        note="CKA: linear and unbiased, of two experts' outputs for the same tokens, mean over"
        " pairs and layers. Over start: less the same of a model of its sizes before training.",
    ),
    "weights_aligned": Measure(
        "likeness of matched weights over start",
        readings.over_before("weights_aligned"),
        lower_is_better=True,
        note="Matched weights: of two experts, with their hidden units in the order in which they"
        " are most alike.",
    ),
    "distinct_experts": Measure(
        "clearly distinct experts",
        readings.inside("distinct", 100),
        "% of the experts",
        digits=1,
        note="Clearly distinct: to no other expert of its layer as alike as 0.85 in its outputs.",
    ),
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
    "busiest_three": Measure(
        "share of the three busiest experts",
        readings.of_load(readings.busiest_percent),
        "%",
        digits=1,
        lower_is_better=True,
        note="Share of the three busiest experts: of all assignments on the held-out text; mean"
        " over layers.",
    ),
    "device_maxvio": Measure(
        "MaxVio of devices on held-out text",
        readings.of_load(readings.device_maxvio),
        digits=2,
        lower_is_better=True,
        note="MaxVio of devices: that of the assignments that devices get, not experts.",
    ),
    "loss_rise": Measure(
        "largest rise of the training loss",
        readings.loss_rise,
        "nats per token",
        lower_is_better=True,
        note="Largest rise of the training loss: how far a logged loss was above the lowest one"
        " before it, at most; it is never 0, since some batches are harder than others.",
    ),
    # A token once to each of the `expert_groups` devices that have experts of it, one way.
    "device_megabytes": Measure(
        "megabytes sent to devices in a step",
        readings.logged("device_megabytes", np.sum, readings.mean_of_last_fifth),
        "MB",
        digits=2,
        lower_is_better=True,
        spread=False,
        note="Megabytes sent to devices: the rows that all layers send to the devices of the"
        " experts, one way, a step; mean of the last fifth of the steps.",
    ),
    "traffic_maxvio": Measure(
        "MaxVio of the rows that devices receive",
        readings.logged("device_rows", readings.mean_maxvio, readings.mean_of_last_fifth),
        digits=2,
        lower_is_better=True,
        note="MaxVio of the rows that devices receive: a token comes once to each device that has"
        " experts of it, so that devices with equal load can differ; mean over layers and the last"
        " fifth of the logged batches.",
    ),
    "teacher_agreement": Measure(
        "agreement with the teacher",
        readings.as_the_teacher,
        "%",
        digits=1,
        note="Agreement with the teacher: the share of tokens of which both find the same next one"
        " best, in training; mean of the last fifth of the logged steps.",
    ),
    # Without compilation, validation and waiting.
    "seconds": Measure("seconds in training steps", readings.seconds, lower_is_better=True),
}


def check_names(owner: str, names: tuple[str, ...]) -> None:
    """Refuses names that are not measures.

    Raises:
      ValueError: naming the owner and the measure.
    """
    for name in names:
        if name not in MEASURES:
            known = ", ".join(MEASURES)
            raise ValueError(f"{owner}: measure {name!r}: must be one of {known}")
