"""Runs and measurements of earlier calls: refused where it is of other configs, data or models."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs import workdir
from dsmoe_jax.study import results
from dsmoe_jax.study.cells import Cell, Options, shell_command
from dsmoe_jax.study.experiment import ProbeArm


def check_workdir(cell: Cell) -> bool:
    """Refuses a workdir of another config before any arm is trained, instead of hours later.

    Returns:
      Whether the corpus is named by another path than it was: it must be the same text.

    Raises:
      ValueError: naming the workdir, the key and both values.
    """
    directory = cell.trained or cell.workdir
    if not (directory / workdir.CONFIG).exists():
        return False
    changes = workdir.changes(directory, cell.config)
    recorded = directory.with_suffix(".json").exists()  # of what text the run is
    for key, (there, here) in changes.items():
        if key != workdir.MOVED or not recorded:
            raise ValueError(
                f"{directory}: holds a run with {key}={there!r}, here it is {here!r}; choose"
                " another --results"
            )
    return bool(changes)


def check_data(cell: Cell, now: str) -> None:
    """Refuses a run of other text than that of the fingerprint `now`.

    Raises:
      ValueError: naming the run and both fingerprints.
    """
    then = results.read_record(cell.record).get("data_fingerprint")
    if then is not None and then != now:
        raise ValueError(
            f"unfair: {cell} was trained on data {then[:12]}, the corpus is {now[:12]} now; bring"
            " the old text back or choose another --results"
        )


def check_trained(cells: list[Cell], options: Options) -> None:
    """Refuses probes of models that are not finished.

    Raises:
      ValueError: naming the workdir, and the command that trains the model.
    """
    for cell in cells:
        if isinstance(cell.arm, ProbeArm) and trained_loss(cell) is None:
            of_model = dataclasses.replace(options, arms=(), cell=None)
            command = shell_command(cell.arm.experiment, of_model)
            raise ValueError(
                f"{cell.trained}: holds no finished run, which {cell} measures; train it with"
                f" {command}"
            )


def check_probe(cell: Cell) -> None:
    """Refuses an existing measurement whose model or intervention has changed since.

    Raises:
      ValueError: naming the measurement and both.
    """
    then = results.read_record(cell.record).get("probed")
    now = probed(cell)
    if then is None or now is None:
        return
    then = {**dataclasses.asdict(Intervention()), **then}  # a field of today, not known then
    if then != now:
        raise ValueError(
            f"{cell.workdir}: measured {then}, here it is {now}; remove it, or choose another"
            " --results"
        )


def probed(cell: Cell) -> dict[str, Any] | None:
    """Intervention and model of a probe, for comparison later; None for an arm that is trained."""
    if not isinstance(cell.arm, ProbeArm) or trained_loss(cell) is None:
        return None
    return {**dataclasses.asdict(cell.arm.intervention), "loss": trained_loss(cell)}


def trained_loss(cell: Cell) -> float | None:
    """The held-out loss of the finished run that a probe measures; None if it is not finished."""
    assert cell.trained is not None
    evaluation = workdir.read_evaluation(cell.trained, "loss")
    finished = evaluation is not None and evaluation["step"] == cell.config.train.steps
    return evaluation["loss"] if evaluation is not None and finished else None
