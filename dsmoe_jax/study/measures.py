"""Measures: numbers by which runs are compared.

A new one is a function and an entry in `MEASURES`.  A measure reads the files of a run.  A number
that does not exist (a dense model has no load), or is not known yet, is None, never 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsmoe_jax.config import Config, tokens_after
from dsmoe_jax.model import size
from dsmoe_jax.study import load_readings

# The tables of a report that have a column for each of their measures.
RESULTS, LOAD = "results", "load"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Files of a run, as far as they are written.

    Attributes:
      config: of the run.
      measured: of the model that is measured; for a probe, as the intervention changes it.
      rows: of metrics.jsonl, in order; a probe has none.
      evaluation: evaluation.json; None until the run is finished.
      before: configs of the runs that were trained before it, with which it begins, or from which
        it learns.
      trained: of a probe, evaluation.json of the run whose model it measures; else None.
    """

    config: Config
    measured: Config
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    before: tuple[Config, ...] = ()
    trained: dict[str, Any] | None = None


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


@functools.cache
def sizes(config: Config) -> dict[str, Any]:
    """Parameters and FLOPs of a config, see `model/size.py`."""
    return size.account(config)


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


def _held_out(key: str, over_layers: Callable[[Any], Any] | None = None):
    """Reads a number of evaluation.json; `over_layers` reduces a number for each layer to one."""

    def read(outcome: Outcome) -> float | None:
        value = (outcome.evaluation or {}).get(key)
        if value is None or over_layers is None:
            return value
        return over_layers(value).item()

    return read


def _before_training(outcome: Outcome) -> float | None:
    """The loss of what a run began with, if that had been trained."""
    before = (outcome.evaluation or {}).get("before")
    return None if before is None else before["loss"]


def _load(reading: Callable[[np.ndarray, Outcome], float | None]):
    """Reads a number from the load on the held-out text."""

    def read(outcome: Outcome) -> float | None:
        load = (outcome.evaluation or {}).get("load")
        return None if load is None else reading(np.array(load, np.float64), outcome)

    return read


def _busiest_percent(load_LE: np.ndarray, outcome: Outcome) -> float:
    del outcome
    return 100 * load_readings.busiest_share(load_LE, 3)


def _device_maxvio(load_LE: np.ndarray, outcome: Outcome) -> float | None:
    return load_readings.device_maxvio(load_LE, outcome.measured.model.moe.expert_groups)


def _by_language(outcome: Outcome) -> float | None:
    return load_readings.by_language(outcome.evaluation or {})


def _by_kind(outcome: Outcome) -> float | None:
    return load_readings.by_kind(outcome.evaluation or {})


def _language_over_kind(outcome: Outcome) -> float | None:
    language = _by_language(outcome)
    kind = _by_kind(outcome)
    return None if language is None or kind is None else language - kind


def _inside(key: str, factor: float = 1.0) -> Callable[[Outcome], float | None]:
    """Reads a number that a probe finds inside a model, mean over layers, parts and draws."""

    def read(outcome: Outcome) -> float | None:
        found = (outcome.evaluation or {}).get("inside", {}).get(key)
        if found is None or found == [] or (isinstance(found, list) and None in found):
            return None
        return factor * float(np.mean(found))

    return read


def _largest(key: str) -> Callable[[Outcome], float | None]:
    """Reads the largest of several numbers that a probe finds."""

    def read(outcome: Outcome) -> float | None:
        found = (outcome.evaluation or {}).get("inside", {}).get(key)
        return max(found) if found else None

    return read


def _over_before(key: str) -> Callable[[Outcome], float | None]:
    """Reads a number of `redundancy.redundancy` less that of a model before training."""

    def read(outcome: Outcome) -> float | None:
        now = _inside(key)(outcome)
        before = _inside(f"{key}_before")(outcome)
        return None if now is None or before is None else now - before

    return read


def _overlap_over_chance(outcome: Outcome) -> float | None:
    overlap = _inside("committee_overlap")(outcome)
    chance = _inside("committee_chance_overlap")(outcome)
    return None if overlap is None or chance is None else overlap - chance


def _invariance(outcome: Outcome) -> float | None:
    """Place of the committees' overlap between chance (0) and blind routing (100)."""
    over_chance = _overlap_over_chance(outcome)
    blind = _inside("overlap_if_blind")(outcome)
    chance = _inside("committee_chance_overlap")(outcome)
    if over_chance is None or blind is None or chance is None or blind <= chance:
        return None
    return 100 * over_chance / (blind - chance)


def _specific_over(key: str) -> Callable[[Outcome], float | None]:
    """Reads how many more experts of a domain there are than in another routing, in % of all."""

    def read(outcome: Outcome) -> float | None:
        seen = _inside("specific", 100)(outcome)
        other = _inside(key, 100)(outcome)
        return None if seen is None or other is None else seen - other

    return read


def _over_trained(outcome: Outcome) -> float | None:
    """The loss of a probe less that of the model as it was trained."""
    if outcome.evaluation is None or outcome.trained is None:
        return None
    return outcome.evaluation["loss"] - outcome.trained["loss"]


def _percent_over_trained(outcome: Outcome) -> float | None:
    rise = _over_trained(outcome)
    if rise is None or outcome.trained is None:
        return None
    return 100 * rise / outcome.trained["loss"]


def _of_part(domains: Mapping[str, Any], names: Sequence[str], *, on: bool) -> float:
    """Nats per token of all text of some domains, or of the others."""
    part = [found for name, found in domains.items() if (name in names) == on]
    tokens = sum(found["tokens"] for found in part)
    return sum(found["loss"] * found["tokens"] for found in part) / tokens


def _part_over_trained(*, on: bool) -> Callable[[Outcome], float | None]:
    """Reads the rise on the domains that `fewer_experts.extracted` is for, or off them."""

    def read(outcome: Outcome) -> float | None:
        names = (outcome.evaluation or {}).get("inside", {}).get("domains")
        if names is None or outcome.evaluation is None or outcome.trained is None:
            return None
        now, before = (found["domains"] for found in (outcome.evaluation, outcome.trained))
        return _of_part(now, names, on=on) - _of_part(before, names, on=on)

    return read


def _off_over_on(outcome: Outcome) -> float | None:
    on = _part_over_trained(on=True)(outcome)
    off = _part_over_trained(on=False)(outcome)
    return None if on is None or off is None else off - on


def _general_over_own(outcome: Outcome) -> float | None:
    """The loss on its domains with a general choice of experts over that with their own."""
    inside = (outcome.evaluation or {}).get("inside", {})
    if outcome.evaluation is None or "general" not in inside:
        return None
    general, own = inside["general"], outcome.evaluation["domains"]
    names = inside["domains"]
    return _of_part(general, names, on=True) - _of_part(own, names, on=True)


def _loss_rise(outcome: Outcome) -> float | None:
    """How far a logged training loss was above the lowest one before it, at most."""
    losses = [row["loss"] for row in outcome.rows if "loss" in row]
    if not losses:
        return None
    return (np.array(losses) - np.minimum.accumulate(losses)).max().item()


def _tokens(outcome: Outcome) -> int | None:
    config = outcome.config
    return tokens_after(config, config.train.steps) if outcome.evaluation is not None else None


def _training_flops(config: Config) -> float:
    """Of a whole run, counted as `flops_per_sequence` is."""
    sequences = tokens_after(config, config.train.steps) / config.data.sequence_length
    return sizes(config)["flops_per_sequence"] * sequences


def _flops_before(outcome: Outcome) -> float | None:
    """Of the runs that it needs; None of a run that needs none."""
    return sum(map(_training_flops, outcome.before)) if outcome.before else None


def _total_training_flops(outcome: Outcome) -> float:
    return sum(map(_training_flops, (*outcome.before, outcome.config)))


def _seconds(outcome: Outcome) -> float | None:
    """Time in training steps, from the logged speeds."""
    seconds = 0.0
    before = 0
    for row in outcome.rows:
        if "tokens_per_second" in row:
            seconds += (row["tokens"] - before) / row["tokens_per_second"]
            before = row["tokens"]
    return seconds or None


def _logged(
    key: str, over_layers: Callable[..., Any], over_steps: Callable[[np.ndarray], Any]
) -> Callable[[Outcome], float | None]:
    """Reads a logged number of each layer, reduced over the layers, then over the steps."""

    def read(outcome: Outcome) -> float | None:
        logged = [over_layers(row[key]) for row in outcome.rows if key in row]
        return over_steps(np.array(logged)).item() if logged else None

    return read


def _as_the_teacher(outcome: Outcome) -> float | None:
    key = "teacher_agreement"
    logged = [row[key] for row in outcome.rows if key in row]
    return 100 * _mean_of_last_fifth(np.array(logged)).item() if logged else None


def _last(values_S: np.ndarray) -> np.ndarray:
    return values_S[-1]


def _mean_of_last_fifth(values_S: np.ndarray) -> np.ndarray:
    return values_S[-max(len(values_S) // 5, 1) :].mean()


RUNNING = "maxvio_running"  # the key in metrics.jsonl: load of the last 100 steps or so

# In the order of the columns of a table.
MEASURES: dict[str, Measure] = {
    "validation_loss": Measure(
        "validation loss",
        _held_out("loss"),
        "nats per token",
        columns={RESULTS: "validation loss"},
        lower_is_better=True,
        note="Loss in nats per token on held-out text.",
    ),
    "validation_loss_before": Measure(
        "validation loss before",
        _before_training,
        "nats per token",
        lower_is_better=True,
        spread=False,
        note="Before: the loss of the parameters that the run began with.",
    ),
    "validation_bits_per_byte": Measure(  # compares between tokenizers
        "validation bits per byte",
        _held_out("bits_per_byte"),
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
        "tokens trained on", _tokens, columns={RESULTS: "tokens"}, digits=None, spread=False
    ),
    "flops_before": Measure(
        "training FLOPs before",
        _flops_before,
        digits=None,
        spread=False,
        from_config=True,
    ),
    "training_flops": Measure(
        "training FLOPs",
        lambda outcome: _training_flops(outcome.config),
        digits=None,
        spread=False,
        from_config=True,
    ),
    "total_training_flops": Measure(
        "training FLOPs in all",
        _total_training_flops,
        digits=None,
        spread=False,
        from_config=True,
        note="Training FLOPs: as the paper counts; before: of the model that the run begins with,"
        " or learns from; in all: both.",
    ),
    "validation_tokens": Measure("tokens judged on", _held_out("tokens"), digits=None),
    "maxvio": Measure(
        "MaxVio on held-out text",
        _held_out("maxvio", np.mean),
        columns={RESULTS: "MaxVio"},
        digits=2,
        lower_is_better=True,
        spread=False,
        note="MaxVio: how far the load of the most loaded expert is above the mean, relative to"
        " it, on the held-out text; mean over layers.",
    ),
    "maxvio_highest": Measure(
        "highest MaxVio of a batch",
        _logged("maxvio", np.mean, np.max),
        columns={LOAD: "MaxVio of a batch: highest"},
        digits=1,
        lower_is_better=True,
    ),
    "maxvio_last_fifth": Measure(
        "MaxVio of a batch in the last fifth of the steps",
        _logged("maxvio", np.mean, _mean_of_last_fifth),
        columns={LOAD: "in the last fifth"},
        digits=2,
        lower_is_better=True,
    ),
    "maxvio_running": Measure(
        "MaxVio over the last 100 steps",
        _logged(RUNNING, np.mean, _last),
        columns={RESULTS: "in training", LOAD: "over the window, at the end"},
        digits=2,
        lower_is_better=True,
        note="In training: MaxVio of the load of the last 100 steps or so.",
    ),
    "maxvio_running_worst": Measure(
        "MaxVio over the last 100 steps in the worst layer",
        _logged(RUNNING, np.max, _last),
        columns={LOAD: "its worst layer"},
        digits=2,
        lower_is_better=True,
    ),
    "dead_experts": Measure(
        "dead experts on held-out text",
        _held_out("dead_experts", np.sum),
        columns={RESULTS: "dead experts"},
        digits=None,
        lower_is_better=True,
        spread=False,
        note="Dead experts: those of all layers without a token of the held-out text.",
    ),
    "dead_experts_highest": Measure(
        "most dead experts in a batch",
        _logged("dead_experts", np.sum, np.max),
        columns={LOAD: "dead experts in a batch: most"},
        digits=0,
        lower_is_better=True,
    ),
    "dead_experts_last": Measure(
        "dead experts in the last batch",
        _logged("dead_experts", np.sum, _last),
        columns={LOAD: "at the end"},
        digits=0,
        lower_is_better=True,
    ),
    "domain_specialisation": Measure(
        "domain specialisation",
        _held_out("domain_specialisation", np.mean),  # see runs/summaries.py
        note="Domain specialisation: how much a chosen expert says about the domain of its token on"
        " the held-out text: 0 where all domains use the same experts, 1 where every expert serves"
        " one domain; mean over layers.",
    ),
    "language_specialisation": Measure(
        "specialisation by language",
        _by_language,
        note="Specialisation by language: the domain specialisation between languages, of the kind"
        " of text that most languages have.",
    ),
    "kind_specialisation": Measure(
        "specialisation by kind of text",
        _by_kind,
        note="Specialisation by kind of text: the domain specialisation between kinds of text, in"
        " the language that has most kinds.",
    ),
    "language_over_kind": Measure(
        "specialisation by language over that by kind of text", _language_over_kind
    ),
    "vocabulary_specialisation": Measure(
        "vocabulary specialisation",
        _inside("vocabulary_specialisation"),
        note="Vocabulary specialisation: the largest share of one expert in the occurrences of a"
        " token id, mean over ids that occur often enough, and over layers.",
    ),
    "committee": Measure(
        "committee of half the gates",
        _inside("committee", 100),
        "% of the experts",
        digits=1,
        note="Committee: the smallest set of experts with half of the sum of all gates; mean over"
        " layers.",
    ),
    "committee_overlap": Measure(
        "overlap of the domains' committees",
        _inside("committee_overlap"),
        note="Overlap: Jaccard index of two domains' committees, mean over pairs and layers.",
    ),
    "overlap_if_blind": Measure(
        "overlap of blind committees",
        _inside("overlap_if_blind"),
        note="Blind: if domains made no difference, with the domains of the sequences shuffled,"
        " which leaves the loads as they are; mean over 20 shuffles.",
    ),
    "invariance": Measure(
        "invariance of the committees",
        _invariance,
        "%",
        digits=1,
        note="Invariance: 0 where two domains' committees overlap as random sets of the same sizes"
        " do, 100 where they overlap as blind ones.",
    ),
    "standing_committee": Measure(
        "standing committee",
        _inside("standing_committee", 100),
        "% of the experts",
        digits=1,
        note="Standing committee: few experts that hold half of the gates in every domain; if all"
        " experts had equal gates, 50 %.",
    ),
    "standing_if_blind": Measure(
        "blind standing committee",
        _inside("standing_if_blind", 100),
        "% of the experts",
        digits=1,
    ),
    "specific_over_blind": Measure(
        "experts of a domain over blind",
        _specific_over("specific_if_blind"),
        "points of %",
        digits=1,
        note="Experts of a domain: with at least twice their mean share of the gates in one.",
    ),
    "specific_over_token": Measure(
        "experts of a domain over tokens",
        _specific_over("specific_by_token"),
        "points of %",
        digits=1,
        note="Over blind, over tokens: less those that there would be if domains made no"
        " difference, or if the token alone decided, each with the mean gates of all of its id.",
    ),
    "experts_per_token": Measure(
        "effective experts of a token",
        _inside("experts_per_token"),
        digits=2,
        note="Effective experts of a token: exp of the entropy of its gates, divided by their sum.",
    ),
    "weights_alike": Measure(
        "likeness of two experts' weights", _inside("weights_alike"), lower_is_better=True
    ),
    "outputs_alike": Measure(
        "likeness of two experts' outputs",
        _inside("outputs_alike"),
        lower_is_better=True,
        note="Likeness: mean cosine over pairs of experts; of outputs, for the same tokens.",
    ),
    "outputs_cka": Measure(
        "CKA of outputs over start",
        _over_before("outputs_cka"),
        lower_is_better=True,
        note="CKA: linear and unbiased, of two experts' outputs for the same tokens, mean over"
        " pairs and layers. Over start: less the same of a model of its sizes before training.",
    ),
    "weights_aligned": Measure(
        "likeness of matched weights over start",
        _over_before("weights_aligned"),
        lower_is_better=True,
        note="Matched weights: of two experts, with their hidden units in the order in which they"
        " are most alike.",
    ),
    "distinct_experts": Measure(
        "clearly distinct experts",
        _inside("distinct", 100),
        "% of the experts",
        digits=1,
        note="Clearly distinct: to no other expert of its layer as alike as 0.85 in its outputs.",
    ),
    "masked_rise": Measure(
        "rise without each token's best",
        _inside("masked_rise"),
        "nats per token",
        digits=4,
        note="Rises: of the loss, on a fifth of the held-out text. Each token's best: its best"
        " sixteenth of the experts is masked (V1 figure 4).",
    ),
    "random_rise": Measure(
        "rise without a random sixteenth",
        _inside("random_rises"),
        "nats per token",
        digits=4,
        note="A random sixteenth: of every layer's experts, for all tokens, mean of 8 draws.",
    ),
    "least_rise": Measure(
        "rise without the least missed",
        _inside("least_rise"),
        "nats per token",
        digits=4,
        note="The least missed: a sixteenth of every layer, chosen on other text.",
    ),
    "sixteenth_rise": Measure(
        "rise without a sixteenth of a layer",
        _inside("sixteenth_rises"),
        "nats per token",
        digits=4,
        note="A sixteenth of a layer, one expert: mean over the sixteenths of all layers, or over"
        " up to 16 experts of each from the least loaded to the most, on 1/40 of the text.",
    ),
    "single_rise": Measure(
        "rise without one expert",
        _inside("single_rises"),
        "nats per token",
        digits=4,
    ),
    "task_gap": Measure(
        "largest difference from the mixture on a task",
        _largest("task_gap"),
        "nats per token",
        digits=6,
        lower_is_better=True,
        spread=False,
        note="Largest difference from the mixture: of the loss on a domain, by the dense model of"
        " its task.",
    ),
    "task_rise": Measure(
        "rise on other tasks",
        _inside("task_rise"),
        "nats per token",
        note="Rise on other tasks: of the loss on the text of all other tasks, by the dense model"
        " of one in place of the mixture; mean over tasks.",
    ),
    "rise": Measure(
        "rise of the loss",
        _over_trained,
        "nats per token",
        digits=4,
        lower_is_better=True,
        note="Rise: the loss on the held-out text less that of the model as it was trained.",
    ),
    "rise_percent": Measure(
        "rise in % of the loss",
        _percent_over_trained,
        "%",
        digits=2,
        lower_is_better=True,
    ),
    "experts_left": Measure(
        "routed experts left", _inside("experts_left"), "%", digits=1, spread=False
    ),
    "parameters_left": Measure(
        "parameters left", _inside("parameters_left"), "%", digits=1, spread=False
    ),
    "most_alike": Measure(
        "likeness of the most alike two",
        _inside("most_alike"),
        lower_is_better=True,
        note="The most alike two: experts of a layer of the whole model, in all layers.",
    ),
    "rise_on": Measure(
        "rise on the domain",
        _part_over_trained(on=True),
        "nats per token",
        digits=4,
        lower_is_better=True,
        note="Rises on the domain's text, and off it, on the rest of the held-out text.",
    ),
    "rise_off": Measure(
        "rise off the domain",
        _part_over_trained(on=False),
        "nats per token",
        digits=4,
    ),
    "off_over_on": Measure(
        "rise off the domain less that on it", _off_over_on, "nats per token", digits=4
    ),
    "general_over_own": Measure(
        "gain of the domain's own choice",
        _general_over_own,
        "nats per token",
        digits=4,
        note="Gain of the own choice: the loss on the domain with as many experts that all text"
        " uses most, less that with those that the domain uses most.",
    ),
    "routing_agreement": Measure(
        "routing agreement",
        _inside("routing_agreement", 100),
        "%",
        digits=2,
        lower_is_better=False,
        note="Routing agreement: share of the experts chosen by the model as it was trained that"
        " are chosen for the same token; on a fifth of the held-out text, mean over layers.",
    ),
    "expert_megabytes": Measure(
        "megabytes of the experts",
        _inside("expert_bytes", 1e-6),
        "MB",
        digits=2,
        lower_is_better=True,
        spread=False,
        note="Megabytes: as they are stored; what is not quantised is float32.",
    ),
    "weight_megabytes": Measure(
        "megabytes of all weights",
        _inside("weight_bytes", 1e-6),
        "MB",
        digits=2,
        lower_is_better=True,
        spread=False,
    ),
    "busiest_three": Measure(
        "share of the three busiest experts",
        _load(_busiest_percent),
        "%",
        digits=1,
        lower_is_better=True,
        note="Share of the three busiest experts: of all assignments on the held-out text; mean"
        " over layers.",
    ),
    "device_maxvio": Measure(
        "MaxVio of devices on held-out text",
        _load(_device_maxvio),
        digits=2,
        lower_is_better=True,
        note="MaxVio of devices: that of the assignments that devices get, not experts.",
    ),
    "loss_rise": Measure(
        "largest rise of the training loss",
        _loss_rise,
        "nats per token",
        lower_is_better=True,
        note="Largest rise of the training loss: how far a logged loss was above the lowest one"
        " before it, at most; it is never 0, since some batches are harder than others.",
    ),
    # A token once to each of the `expert_groups` devices that have experts of it, one way.
    "device_megabytes": Measure(
        "megabytes sent to devices in a step",
        _logged("device_megabytes", np.sum, _mean_of_last_fifth),
        "MB",
        digits=2,
        lower_is_better=True,
        spread=False,
        note="Megabytes sent to devices: the rows that all layers send to the devices of the"
        " experts, one way, a step; mean of the last fifth of the steps.",
    ),
    "teacher_agreement": Measure(
        "agreement with the teacher",
        _as_the_teacher,
        "%",
        digits=1,
        note="Agreement with the teacher: the share of tokens of which both find the same next one"
        " best, in training; mean of the last fifth of the logged steps.",
    ),
    # Without compilation, validation and waiting.
    "seconds": Measure("seconds in training steps", _seconds, lower_is_better=True),
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
