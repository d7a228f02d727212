"""Values that training logged, step by step, and loads on the held-out text.

Shapes: S logged steps, G domains, L MoE layers, E routed experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.runs.summaries import MIN_DOMAIN_TOKENS
from dsmoe_jax.study.measures import RUNNING
from dsmoe_jax.study.readings import Outcome


class Loads(NamedTuple):
    """Load of every expert at each logged step.

    Attributes:
      tokens_S: trained on so far.
      load_SLE: assignments over the layer's mean: 1 is balance.
    """

    tokens_S: np.ndarray
    load_SLE: np.ndarray


class DomainLoads(NamedTuple):
    """Load of every expert on the held-out text of each domain.

    Attributes:
      names: of the domains that are large enough for `specialisation_L`.
      load_GLE: assignments over the mean of the domain and layer: 1 is balance.
      specialisation_L: see `summaries.domain_specialisation`.
    """

    names: tuple[str, ...]
    load_GLE: np.ndarray
    specialisation_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class History:
    """Logged values of a run, in order.

    Attributes:
      tokens, loss: trained on so far, and training loss in nats per token, at each logged step.
      validation_tokens, validation_loss: the same at each validation during training.
      maxvio_SL: of each logged batch; empty without routed experts.
      maxvio_running_SL: the same for the load of the last 100 steps or so.
      load_LE: load of every expert on the held-out text over its layer's mean (1 is balance);
        None without routed experts, or before the run is finished.
      loads: of every expert over training; None without routed experts.
      domain_loads: None without routed experts, before the run is finished, or with too little
        held-out text.
    """

    tokens: np.ndarray
    loss: np.ndarray
    validation_tokens: np.ndarray
    validation_loss: np.ndarray
    maxvio_SL: np.ndarray
    maxvio_running_SL: np.ndarray
    load_LE: np.ndarray | None
    loads: Loads | None
    domain_loads: DomainLoads | None = None


def read_history(outcome: Outcome) -> History | None:
    """Logged values of a run so far; None before its first row."""
    if not outcome.rows:
        return None
    trained = [row for row in outcome.rows if "loss" in row]
    validated = [row for row in trained if "validation_loss" in row]
    routed = [row for row in trained if "maxvio" in row]
    load = (outcome.evaluation or {}).get("load")
    load_LE = None if load is None else np.asarray(load, np.float64)
    return History(
        tokens=_column(trained, "tokens"),
        loss=_column(trained, "loss"),
        validation_tokens=_column(validated, "tokens"),
        validation_loss=_column(validated, "validation_loss"),
        maxvio_SL=np.array([row["maxvio"] for row in routed]),
        maxvio_running_SL=np.array([row[RUNNING] for row in routed]),
        load_LE=None if load_LE is None else load_LE / load_LE.mean(axis=1, keepdims=True),
        loads=loads_of(trained),
        domain_loads=domain_loads_of(outcome.evaluation or {}),
    )


def loads_of(rows: list[dict[str, Any]]) -> Loads | None:
    """Load from the rows of metrics.jsonl; None without routed experts."""
    rows = [row for row in rows if "load" in row]
    if not rows:
        return None
    load_SLE = np.array([row["load"] for row in rows], np.float64)
    tokens_S = np.array([row["tokens"] for row in rows], np.float64)
    return Loads(tokens_S, load_SLE / load_SLE.mean(axis=2, keepdims=True))


def domain_loads_of(evaluation: dict[str, Any]) -> DomainLoads | None:
    """Load by domain from evaluation.json; None if it has no specialisation."""
    specialisation = evaluation.get("domain_specialisation")
    if specialisation is None:
        return None
    domains = evaluation["domains"]
    names = tuple(n for n, row in domains.items() if row["tokens"] >= MIN_DOMAIN_TOKENS)
    load_GLE = np.array([evaluation["load_by_domain"][name] for name in names], np.float64)
    mean_GL1 = load_GLE.mean(axis=2, keepdims=True)
    return DomainLoads(names, load_GLE / mean_GL1, np.array(specialisation))


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows], np.float64)
