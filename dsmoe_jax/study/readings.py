"""Readings of the files of a run: the functions behind `measures.MEASURES`.

A reading takes an `Outcome` and returns a number, or None where it does not exist (a dense model
has no load) or is not known yet.  Those of loads by expert are in load_readings.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsmoe_jax.config import Config, tokens_after
from dsmoe_jax.model import size
from dsmoe_jax.runs.summaries import maxvio
from dsmoe_jax.study import load_readings


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


@functools.cache
def sizes(config: Config) -> dict[str, Any]:
    """Parameters and FLOPs of a config, see `model/size.py`."""
    return size.account(config)


def held_out(key: str, over_layers: Callable[[Any], Any] | None = None):
    """Reads a number of evaluation.json; `over_layers` reduces a number for each layer to one."""

    def read(outcome: Outcome) -> float | None:
        value = (outcome.evaluation or {}).get(key)
        if value is None or over_layers is None:
            return value
        return over_layers(value).item()

    return read


def loss_before(outcome: Outcome) -> float | None:
    """The loss of what a run began with, if that had been trained."""
    before = (outcome.evaluation or {}).get("before")
    return None if before is None else before["loss"]


def of_load(reading: Callable[[np.ndarray, Outcome], float | None]):
    """Reads a number from the load on the held-out text."""

    def read(outcome: Outcome) -> float | None:
        load = (outcome.evaluation or {}).get("load")
        return None if load is None else reading(np.array(load, np.float64), outcome)

    return read


def busiest_percent(load_LE: np.ndarray, outcome: Outcome) -> float:
    """Percent of the assignments that the three busiest experts of a layer have."""
    del outcome
    return 100 * load_readings.busiest_share(load_LE, 3)


def device_maxvio(load_LE: np.ndarray, outcome: Outcome) -> float | None:
    """MaxVio of the devices of the config; None with one device."""
    return load_readings.device_maxvio(load_LE, outcome.measured.model.moe.expert_groups)


def by_language(outcome: Outcome) -> float | None:
    """Specialisation of the load by the language of a text."""
    return load_readings.by_language(outcome.evaluation or {})


def by_kind(outcome: Outcome) -> float | None:
    """Specialisation of the load by the kind of a text."""
    return load_readings.by_kind(outcome.evaluation or {})


def language_over_kind(outcome: Outcome) -> float | None:
    """By how much the load says more about the language than about the kind."""
    language = by_language(outcome)
    kind = by_kind(outcome)
    return None if language is None or kind is None else language - kind


def inside(key: str, factor: float = 1.0) -> Callable[[Outcome], float | None]:
    """Reads a number that a probe finds inside a model, mean over layers, parts and draws."""

    def read(outcome: Outcome) -> float | None:
        found = (outcome.evaluation or {}).get("inside", {}).get(key)
        if found is None or found == [] or (isinstance(found, list) and None in found):
            return None
        return factor * float(np.mean(found))

    return read


def largest(key: str) -> Callable[[Outcome], float | None]:
    """Reads the largest of several numbers that a probe finds."""

    def read(outcome: Outcome) -> float | None:
        found = (outcome.evaluation or {}).get("inside", {}).get(key)
        return max(found) if found else None

    return read


def over_before(key: str) -> Callable[[Outcome], float | None]:
    """Reads a number of `redundancy.redundancy` less that of a model before training."""

    def read(outcome: Outcome) -> float | None:
        now = inside(key)(outcome)
        before = inside(f"{key}_before")(outcome)
        return None if now is None or before is None else now - before

    return read


def overlap_over_chance(outcome: Outcome) -> float | None:
    """Overlap of two domains' committees over that of random ones."""
    overlap = inside("committee_overlap")(outcome)
    chance = inside("committee_chance_overlap")(outcome)
    return None if overlap is None or chance is None else overlap - chance


def invariance(outcome: Outcome) -> float | None:
    """Place of the committees' overlap between chance (0) and blind routing (100)."""
    over_chance = overlap_over_chance(outcome)
    blind = inside("overlap_if_blind")(outcome)
    chance = inside("committee_chance_overlap")(outcome)
    if over_chance is None or blind is None or chance is None or blind <= chance:
        return None
    return 100 * over_chance / (blind - chance)


def specific_over(key: str) -> Callable[[Outcome], float | None]:
    """Reads how many more experts of a domain there are than in another routing, in % of all."""

    def read(outcome: Outcome) -> float | None:
        seen = inside("specific", 100)(outcome)
        other = inside(key, 100)(outcome)
        return None if seen is None or other is None else seen - other

    return read


def over_trained(outcome: Outcome) -> float | None:
    """The loss of a probe less that of the model as it was trained."""
    if outcome.evaluation is None or outcome.trained is None:
        return None
    return outcome.evaluation["loss"] - outcome.trained["loss"]


def percent_over_trained(outcome: Outcome) -> float | None:
    """The rise of the loss over that of the trained run, in percent of it."""
    rise = over_trained(outcome)
    if rise is None or outcome.trained is None:
        return None
    return 100 * rise / outcome.trained["loss"]


def of_part(domains: Mapping[str, Any], names: Sequence[str], *, on: bool) -> float:
    """Nats per token of all text of some domains, or of the others."""
    part = [found for name, found in domains.items() if (name in names) == on]
    tokens = sum(found["tokens"] for found in part)
    return sum(found["loss"] * found["tokens"] for found in part) / tokens


def part_over_trained(*, on: bool) -> Callable[[Outcome], float | None]:
    """Reads the rise on the domains that `fewer_experts.extracted` is for, or off them."""

    def read(outcome: Outcome) -> float | None:
        names = (outcome.evaluation or {}).get("inside", {}).get("domains")
        if names is None or outcome.evaluation is None or outcome.trained is None:
            return None
        now, before = (found["domains"] for found in (outcome.evaluation, outcome.trained))
        return of_part(now, names, on=on) - of_part(before, names, on=on)

    return read


def off_over_on(outcome: Outcome) -> float | None:
    """The rise off the domain less that on it."""
    on = part_over_trained(on=True)(outcome)
    off = part_over_trained(on=False)(outcome)
    return None if on is None or off is None else off - on


def general_over_own(outcome: Outcome) -> float | None:
    """The loss on its domains with a general choice of experts over that with their own."""
    inside = (outcome.evaluation or {}).get("inside", {})
    if outcome.evaluation is None or "general" not in inside:
        return None
    general, own = inside["general"], outcome.evaluation["domains"]
    names = inside["domains"]
    return of_part(general, names, on=True) - of_part(own, names, on=True)


def loss_rise(outcome: Outcome) -> float | None:
    """Largest rise of a logged training loss above the lowest one before it."""
    losses = [row["loss"] for row in outcome.rows if "loss" in row]
    if not losses:
        return None
    return (np.array(losses) - np.minimum.accumulate(losses)).max().item()


def generalisation_gap(outcome: Outcome) -> float | None:
    """Held-out loss at the end above the training loss of the last fifth of the logged steps."""
    losses = [row["loss"] for row in outcome.rows if "loss" in row]
    if not losses or outcome.evaluation is None:
        return None
    return outcome.evaluation["loss"] - mean_of_last_fifth(np.array(losses)).item()


def tokens(outcome: Outcome) -> int | None:
    """Tokens of a finished run."""
    config = outcome.config
    return tokens_after(config, config.train.steps) if outcome.evaluation is not None else None


def training_flops(config: Config) -> float:
    """FLOPs of a whole run, counted as `flops_per_sequence` is."""
    sequences = tokens_after(config, config.train.steps) / config.data.sequence_length
    return sizes(config)["flops_per_sequence"] * sequences


def flops_before(outcome: Outcome) -> float | None:
    """FLOPs of the runs that it needs; None of a run that needs none."""
    return sum(map(training_flops, outcome.before)) if outcome.before else None


def total_training_flops(outcome: Outcome) -> float:
    """Training FLOPs, with those of the runs that it needs."""
    return sum(map(training_flops, (*outcome.before, outcome.config)))


def seconds(outcome: Outcome) -> float | None:
    """Time in training steps, from the logged speeds."""
    seconds = 0.0
    before = 0
    for row in outcome.rows:
        if "tokens_per_second" in row:
            seconds += (row["tokens"] - before) / row["tokens_per_second"]
            before = row["tokens"]
    return seconds or None


def logged(
    key: str, over_layers: Callable[..., Any], over_steps: Callable[[np.ndarray], Any]
) -> Callable[[Outcome], float | None]:
    """Reads a logged number of each layer, reduced over the layers, then over the steps."""

    def read(outcome: Outcome) -> float | None:
        logged = [over_layers(row[key]) for row in outcome.rows if key in row]
        return over_steps(np.array(logged)).item() if logged else None

    return read


def mean_maxvio(counts_LD: Sequence[Sequence[float]]) -> float:
    """MaxVio of what the devices of each layer receive, mean over layers."""
    return np.mean(maxvio(np.array(counts_LD, np.float64))).item()


def as_the_teacher(outcome: Outcome) -> float | None:
    """Percent of tokens of which student and teacher find the same next one best."""
    key = "teacher_agreement"
    logged = [row[key] for row in outcome.rows if key in row]
    return 100 * mean_of_last_fifth(np.array(logged)).item() if logged else None


def last(values_S: np.ndarray) -> np.ndarray:
    """The last logged step."""
    return values_S[-1]


def mean_of_last_fifth(values_S: np.ndarray) -> np.ndarray:
    """The mean of the last fifth of the logged steps."""
    return values_S[-max(len(values_S) // 5, 1) :].mean()
