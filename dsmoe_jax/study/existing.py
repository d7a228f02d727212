"""Runs and measurements of earlier calls: refused where it is of other configs, data or models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs import workdir
from dsmoe_jax.study import results
from dsmoe_jax.study.cells import Cell, Options, shell_command
from dsmoe_jax.study.experiment import Arm, ProbeArm


def check_workdir(cell: Cell) -> bool:
    """Refuses a workdir of another config before any arm is trained, instead of hours later.

    Returns:
      Whether the corpus is named by another path than it was: it must be the same text.

    Raises:
      ValueError: naming the workdir, the key and both values.
    """
    cell = cell.probed or cell
    for needed in cell.needs.values():
        check_workdir(needed)
    directory = cell.workdir
    if not (directory / workdir.CONFIG).exists():
        return False
    changes = workdir.changes(directory, cell.launched)
    for key in cell.needs:
        if key in changes and _is_same_place(*changes[key], cell):
            del changes[key]
    recorded = cell.record.exists()  # of what text the run is
    for key, (there, here) in changes.items():
        if key != workdir.MOVED or not recorded:
            raise ValueError(
                f"{directory}: holds a run with {key}={there!r}, here it is {here!r}; choose"
                " another --results"
            )
    return bool(changes)


def _is_same_place(there: str | None, here: str, cell: Cell) -> bool:
    """Whether two workdirs are one, among results that have moved."""
    below = Path(here).relative_to(cell.workdir.parents[1])
    return there is not None and Path(there).parts[-len(below.parts) :] == below.parts


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
    """Refuses probes of models that are not finished, and runs that need one.

    Raises:
      ValueError: naming the workdir, and the command that trains the model.
    """
    options = dataclasses.replace(options, arms=(), cell=None)
    for cell in cells:
        if isinstance(cell.arm, ProbeArm) and trained_loss(cell) is None:
            command = shell_command(cell.arm.experiment, options)
            raise ValueError(
                f"{cell.trained}: holds no finished run, which {cell} measures; train it with"
                f" {command}"
            )
        for key, needed in cell.needs.items():
            if _final_loss(needed) is None:
                assert isinstance(cell.arm, Arm), "a probe needs no other run"
                of_model = dataclasses.replace(
                    options,
                    arms=(needed.arm.slug,),
                    overrides=cell.arm.passed_on(options.scale, options.overrides),
                )
                command = shell_command(cell.arm.from_runs[key].experiment, of_model)
                raise ValueError(
                    f"{needed.workdir}: holds no finished run, which {cell} needs for {key};"
                    f" train it with {command}"
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


def check_needs(cell: Cell) -> None:
    """Refuses a run that has begun with another model than there is now.

    Raises:
      ValueError: naming the run, the key and the losses of both models.
    """
    then = results.read_record(cell.record).get("needs", {})
    for key, loss in needs(cell).items():
        if loss is not None and then.get(key, loss) != loss:
            raise ValueError(
                f"{cell.workdir}: {key} was a model of loss {then[key]}, it is one of {loss} now;"
                f" remove {cell.workdir}*, or choose another --results"
            )


def needs(cell: Cell) -> dict[str, float | None]:
    """The held-out losses of the runs that a run needs, by key, for comparison later."""
    return {key: _final_loss(needed) for key, needed in cell.needs.items()}


def trained_loss(cell: Cell) -> float | None:
    """The held-out loss of the finished run that a probe measures; None if it is not finished."""
    assert cell.probed is not None
    return _final_loss(cell.probed)


def _final_loss(cell: Cell) -> float | None:
    evaluation = workdir.read_evaluation(cell.workdir, "loss")
    finished = evaluation is not None and evaluation["step"] == cell.config.train.steps
    return evaluation["loss"] if evaluation is not None and finished else None
