"""Refuses comparisons that are not fair, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsmoe_jax.config import Config, differences
from dsmoe_jax.study import results
from dsmoe_jax.study.results import Row
from dsmoe_jax.study.spec import QUANTITIES, Equal, Experiment


def check_configs(experiment: Experiment, configs: Mapping[str, Config]) -> None:
    """Checks that arms differ only where they may, and agree in size where they must.

    Args:
      experiment: with its rules.
      configs: by label, all of the same seed; rules about arms that are not here are left out.

    Raises:
      ValueError: naming both arms, both values and the tolerance.
    """
    (first, reference), *others = configs.items()
    for label, config in others:
        for key, (a, b) in differences(reference, config).items():
            if not _may_differ(key, experiment):
                raise ValueError(
                    f"{experiment.name}: unfair: {key} is {a!r} in {first} and {b!r} in {label};"
                    f" arms may differ only in {', '.join(experiment.may_differ)}"
                )
    sizes = {label: results.sizes(config) for label, config in configs.items()}
    for rule in experiment.equal:
        _check_rule(experiment, rule, sizes)


def _may_differ(key: str, experiment: Experiment) -> bool:
    return any(
        key == name or (name.endswith(".") and key.startswith(name))
        for name in experiment.may_differ
    )


def _check_rule(experiment: Experiment, rule: Equal, sizes: Mapping[str, Any]) -> None:
    labels = [label for label in rule.arms if label in sizes]
    for label in labels[1:]:
        a, b = (sizes[name][rule.quantity] for name in (labels[0], label))
        if abs(b - a) > rule.tolerance * a:
            raise ValueError(
                f"{experiment.name}: unfair: {QUANTITIES[rule.quantity]} of {labels[0]} ({a:,.0f})"
                f" and {label} ({b:,.0f}) differ by {100 * abs(b / a - 1):.2f} %; at most"
                f" {100 * rule.tolerance:g} % is allowed"
            )


def check_measured(experiment: Experiment, rows: list[Row]) -> None:
    """Checks that finished runs were trained and judged on the same data, and on as many tokens.

    Args:
      experiment: for its name.
      rows: of `results.jsonl`.

    Raises:
      ValueError: naming both runs and both values.
    """
    for key in ("data_fingerprint", "tokens", "validation_tokens"):
        measured = [(row, getattr(row, key)) for row in rows if getattr(row, key) is not None]
        for row, value in measured[1:]:
            first, expected = measured[0]
            if value != expected:
                raise ValueError(
                    f"{experiment.name}: unfair: {key} is {expected} in {first.arm}, seed"
                    f" {first.seed}, and {value} in {row.arm}, seed {row.seed}; train one of them"
                    " again (another --results, or remove its directory)"
                )
