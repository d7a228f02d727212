"""Readings of the loads in evaluation.json: busiest experts, devices, languages, kinds of text.

Shapes: L MoE layers, E routed experts, D devices of the config (`expert_groups`), G domains.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsmoe_jax.runs import summaries


def busiest_share(load_LE: np.ndarray, n: int) -> float:
    """Share of all assignments that the `n` busiest experts of a layer have, mean over layers."""
    ascending_LE = np.sort(load_LE, axis=1)
    return (ascending_LE[:, -n:].sum(axis=1) / load_LE.sum(axis=1)).mean().item()


def device_maxvio(load_LE: np.ndarray, n_devices: int) -> float | None:
    """MaxVio of the assignments that devices get, mean over layers; None with one device.

    Experts are on devices in their order, equally many on each.
    """
    if n_devices == 1:
        return None
    by_device_LD = load_LE.reshape(len(load_LE), n_devices, -1).sum(axis=2)
    return float(np.mean(summaries.maxvio(by_device_LD)))


def by_language(evaluation: Mapping[str, Any]) -> float | None:
    """Domain specialisation between languages, the kind of text being the same.

    A domain is named by its language and its kind: `de_parliament`.  Of the kinds, that which most
    languages have is taken.  None unless there are two; see `summaries.domain_specialisation`.
    """
    return _specialisation(evaluation, of_names=0)


def by_kind(evaluation: Mapping[str, Any]) -> float | None:
    """Domain specialisation between kinds of text, the language being the same.

    Of the languages, that which has most kinds is taken; otherwise as `by_language`.
    """
    return _specialisation(evaluation, of_names=1)


def _specialisation(evaluation: Mapping[str, Any], of_names: int) -> float | None:
    """Specialisation between domains that differ in one part of the name and agree in the other."""
    load_by_domain = evaluation.get("load_by_domain")
    if not load_by_domain:
        return None
    alike: dict[str, list[str]] = defaultdict(list)
    for name in load_by_domain:
        parts = name.split("_", 1)
        if len(parts) == 2 and _is_language(parts[0]):
            alike[parts[1 - of_names]].append(name)
    names = max(alike.values(), key=len, default=[])
    load_GLE = np.array([load_by_domain[name] for name in names], np.float64)
    tokens_G = np.array([evaluation["domains"][name]["tokens"] for name in names])
    if len(names) < 2:
        return None
    by_layer = summaries.domain_specialisation(load_GLE, tokens_G)
    return None if by_layer is None else float(np.mean(by_layer))


def _is_language(part: str) -> bool:
    """Whether the first part of a domain's name is a code of a language, as in ISO 639-1."""
    return len(part) == 2 and part.isalpha()
