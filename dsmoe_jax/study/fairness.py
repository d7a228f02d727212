"""Refuses comparisons that are not fair, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe_jax.config import differences
from dsmoe_jax.study.cells import Cell
from dsmoe_jax.study.experiment import Equal, Experiment
from dsmoe_jax.study.measures import MEASURES, Outcome
from dsmoe_jax.study.results import Row


def check_configs(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Checks that arms differ only where they may, and agree in size where they must.

    Args:
      experiment: whose rules are checked.
      cells: of one seed, one an arm; arms without a cell are left out of the rules.

    Raises:
      ValueError: naming both arms, both values and the tolerance.
    """
    first, *others = cells
    for cell in others:
        for key, (a, b) in differences(first.config, cell.config).items():
            if not _may_differ(key, experiment):
                raise ValueError(
                    f"{experiment.name}: unfair: {key} is {a!r} in {first.arm.label} and {b!r} in"
                    f" {cell.arm.label}; arms may differ only in"
                    f" {', '.join(experiment.may_differ)}"
                )
    outcomes = {cell.arm.label: Outcome(cell.config, cell.measured) for cell in cells}
    for rule in experiment.equal:
        _check_rule(experiment, rule, outcomes)


def _may_differ(key: str, experiment: Experiment) -> bool:
    return any(
        key == name or (name.endswith(".") and key.startswith(name))
        for name in experiment.may_differ
    )


def _check_rule(experiment: Experiment, rule: Equal, outcomes: Mapping[str, Outcome]) -> None:
    quantity = MEASURES[rule.quantity]
    labels = [label for label in rule.arms if label in outcomes]
    sizes: list[Any] = [quantity.read(outcomes[label]) for label in labels]
    for label, size in zip(labels[1:], sizes[1:], strict=True):
        if abs(size - sizes[0]) > rule.tolerance * sizes[0]:
            raise ValueError(
                f"{experiment.name}: unfair: {quantity.title} of {labels[0]} ({sizes[0]:,.0f})"
                f" and {label} ({size:,.0f}) differ by {100 * abs(size / sizes[0] - 1):.2f} %; at"
                f" most {100 * rule.tolerance:g} % is allowed"
            )


def check_measured(experiment: Experiment, rows: list[Row]) -> None:
    """Checks that finished runs were trained and evaluated on the same data and number of tokens.

    Args:
      experiment: for its name, and what may differ.
      rows: of `results.jsonl`.

    Raises:
      ValueError: naming both runs and both values.
    """
    columns = {
        "data_fingerprint": [row.data_fingerprint for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "validation_tokens": [row["validation_tokens"] for row in rows],
    }
    for key, values in columns.items():
        if key in experiment.measured_may_differ:
            continue
        known = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
        for row, value in known[1:]:
            first, expected = known[0]
            if value != expected:
                raise ValueError(
                    f"{experiment.name}: unfair: {key} is {expected} in {first.arm}, seed"
                    f" {first.seed}, and {value} in {row.arm}, seed {row.seed}; train one of them"
                    " again (another --results, or remove its directory)"
                )
