"""Refuses comparisons that are not fair, before anything is trained or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe_jax.config import Config, differences, stages_of, tokens_after
from dsmoe_jax.runs import workdir
from dsmoe_jax.study import results
from dsmoe_jax.study.cells import Cell
from dsmoe_jax.study.experiment import Equal, Experiment
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.readings import Outcome
from dsmoe_jax.study.results import Row


def check_configs(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Checks that arms differ only where they may, and agree in size and tokens where they must.

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
    _check_tokens(experiment, cells)
    outcomes = {
        cell.arm.label: Outcome(cell.config, cell.measured, before=cell.before) for cell in cells
    }
    for rule in experiment.equal:
        _check_rule(experiment, rule, outcomes)


def _check_tokens(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Refuses what `check_measured` would refuse after the runs, as far as the configs say it."""
    columns = {
        "tokens": [tokens_after(cell.config, cell.config.train.steps) for cell in cells],
        "validation_tokens": [_validation_tokens(cell.config) for cell in cells],
    }
    for key, values in columns.items():
        if key in experiment.measured_may_differ:
            continue
        for cell, value in zip(cells[1:], values[1:], strict=True):
            if value != values[0]:
                raise ValueError(
                    f"{experiment.name}: unfair: {key} would be {values[0] or 'all'} in"
                    f" {cells[0].arm.label} and {value or 'all'} in {cell.arm.label}"
                )


def _validation_tokens(config: Config) -> int | None:
    """Tokens that a validation may take at most; None is the whole split."""
    last = stages_of(config)[-1].config
    if last.train.eval_batches is None:
        return None
    return last.train.eval_batches * last.train.global_batch_size * last.data.sequence_length


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


def check_probes(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Checks that the models that probes measure are of one step, and judged on one text.

    Args:
      experiment: for its name.
      cells: of all arms and seeds; those that are no probes, or whose model is not trained yet, are
        left out.

    Raises:
      ValueError: naming both models and both values, or the checkpoint that is missing.
    """
    probes = [cell for cell in cells if cell.trained is not None]
    trained = [results.read_trained(cell) for cell in probes]
    columns = {
        "step": [run.step for run in trained],
        "data_fingerprint": [run.data_fingerprint for run in trained],
        "validation_tokens": [run.validation_tokens for run in trained],
    }
    for key, values in columns.items():
        known = [(cell, value) for cell, value in zip(probes, values, strict=True) if value]
        for cell, value in known[1:]:
            first, expected = known[0]
            if value != expected:
                raise ValueError(
                    f"{experiment.name}: unfair: {key} is {expected} in {first.trained}, which"
                    f" {first} measures, and {value} in {cell.trained}, which {cell} measures;"
                    " train one of them again"
                )
    for cell, run in zip(probes, trained, strict=True):
        _check_checkpoint(experiment, cell, run.step)


def _check_checkpoint(experiment: Experiment, cell: Cell, step: int | None) -> None:
    """Refuses a model whose evaluation is of another step than any checkpoint there is."""
    assert cell.trained is not None
    directory = cell.trained / workdir.CHECKPOINTS
    if step is None or not directory.is_dir():
        return  # not trained yet, which is said elsewhere
    steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    if step not in steps:
        raise ValueError(
            f"{experiment.name}: unfair: {cell.trained} was evaluated at step {step}, but the"
            f" checkpoints that {cell} could measure are of steps {steps}; train it again"
        )


def check_corpus(experiment: Experiment, cells: Sequence[Cell], now: str) -> None:
    """Checks that the models that probes measure were trained on the corpus of today.

    Args:
      experiment: for its name.
      cells: of all arms and seeds; those that are no probes are left out.
      now: fingerprint of the corpus.

    Raises:
      ValueError: naming the model and both fingerprints.
    """
    for cell in cells:
        then = None if cell.trained is None else results.read_trained(cell).data_fingerprint
        if then is not None and then != now:
            raise ValueError(
                f"{experiment.name}: unfair: {cell.trained}, which {cell} measures, was trained on"
                f" data {then[:12]}, the corpus is {now[:12]} now; bring the old text back"
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
