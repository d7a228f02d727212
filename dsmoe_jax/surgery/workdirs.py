"""A workdir from another one, by an operation.

The new workdir has the config, the tokenizer and one checkpoint, of the step that the model had:
`evaluate`, `generate`, `analyse` and `convert` take it, `train` goes on with it, and a training
begins with it by `train.start_from`.  `surgery.json` has the operations that made it, those that
had made the old one first.

Nothing is left half-written, and the old workdir does not change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dsmoe_jax.config import Config, to_config_dict
from dsmoe_jax.hf.workdirs import KEPT
from dsmoe_jax.model.build import ModelState, model_shapes
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs import json_files, loading, new_directory
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.checkpoint import MODEL, Checkpoints
from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import place_of
from dsmoe_jax.surgery import OPERATIONS, Outcome, Subject
from dsmoe_jax.training.freezing import Freezing
from dsmoe_jax.training.optimizer import optimizer_of
from dsmoe_jax.training.start import TRAINING, TrainState, abstract_state, from_items, to_items

_FROM = "--from"
_RUNNING_LOAD = "running_load"  # beside a checkpoint, see training/rows.py


def _carried(outcome: Outcome, state: TrainState) -> Any:
    """The moments of the old parameters, changed as these were."""
    if outcome.moments is None:
        raise ValueError(
            "--moments=carried: they have no meaning for the new model; must be fresh or none"
        )
    return outcome.moments(state.opt_state)


def _fresh(outcome: Outcome, state: TrainState) -> Any:
    """Moments of 0; the schedule of the learning rate goes on where it was."""
    trained, _ = Freezing(outcome.config).split(outcome.model.params)
    fresh = optimizer_of(outcome.config).init(trained)

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    # The two trees may differ in their parameters, but not in their schedules.
    before = filter(is_schedule, jax.tree.leaves(state.opt_state, is_leaf=is_schedule))
    return jax.tree.map(
        lambda new: next(before) if is_schedule(new) else new, fresh, is_leaf=is_schedule
    )


# The optimizer's state of the new model; None: it gets none, and training begins with
# `train.start_from`.
MOMENTS: dict[str, Callable[[Outcome, TrainState], Any] | None] = {
    "carried": _carried,
    "fresh": _fresh,
    "none": None,
}


class Made(NamedTuple):
    """A workdir that was made, the step of its checkpoint, and what the operation gave."""

    place: Path
    step: int
    outcome: Outcome


class _Source(NamedTuple):
    """The checkpoint of a run: with an optimizer's state, or the model alone."""

    config: Config
    step: int
    model: ModelState
    training: TrainState | None
    extra: dict[str, Any]


def operate(
    name: str,
    workdir: str,
    to: str,
    options: Mapping[str, Any],
    *,
    step: int | None = None,
    moments: str | None = None,
) -> Made:
    """Makes a workdir by an operation.

    Args:
      name: of the operation.
      workdir: of a run, converted, or made by another operation.
      to: must not exist, or be empty.
      options: of the operation, all of them by name.
      step: of the checkpoint; None is the newest.
      moments: a name in `MOMENTS`; None is "carried", or "none" where nothing can be trained.

    Raises:
      ValueError: for options that do not fit, a workdir without a checkpoint or a damaged one.
      OSError: if the disk is full.
    """
    moments = _moments_of(name, moments)
    place = new_directory.new(to, "--to")
    source = _read(workdir, step, with_training=MOMENTS[moments] is not None)
    outcome = OPERATIONS[name].run(Subject(source.config, source.model), options)
    items: dict[str, Any] = {MODEL: outcome.model}
    if source.training is not None:
        make = MOMENTS[moments]
        assert make is not None
        state = TrainState(
            source.training.step,
            outcome.model.params,
            make(outcome, source.training),
            outcome.model.other,
        )
        items = to_items(state)
    new_directory.check_space(place, sum(x.nbytes for x in jax.tree.leaves(items)))
    entry = {
        "operation": name,
        "options": dict(options),
        "moments": moments,
        "from": str(place_of(_FROM, workdir)),
        "step": source.step,
        "report": outcome.report,
    }
    with new_directory.beside(place) as made:
        _write(made, place_of(_FROM, workdir), outcome.config, entry)
        checkpoints = Checkpoints(made / workdirs.CHECKPOINTS, keep=1)
        # An interrupt waits for the arrays on their way, or they would come back after the removal.
        with contextlib.closing(checkpoints):
            checkpoints.save(source.step, items, _extra(source.extra, outcome))
    return Made(place, source.step, outcome)


def _moments_of(name: str, moments: str | None) -> str:
    """The fate of the optimizer's state in an operation."""
    if OPERATIONS[name].trainable:
        return moments or "carried"
    if moments not in (None, "none"):
        raise ValueError(f"--moments={moments}: {name} makes no model to train; must be none")
    return "none"


def _read(workdir: str, step: int | None, *, with_training: bool) -> _Source:
    """The checkpoint of a workdir, on the ambient mesh."""
    key = f"{_FROM}={workdir}"
    config = workdirs.read_config(workdir, key)
    if config.model.moe.quantised is not None:
        raise ValueError(
            f"{key}: its experts are quantised; must be the run that it was made from, to be"
            " quantised when all else is done"
        )
    shapes = model_shapes(config.model)
    if not (mesh := jax.sharding.get_mesh()).empty:
        sharding.check(shapes, mesh.shape)
    if not with_training:
        loaded = loading.load_model_state(workdir, shapes, step, key)
        return _Source(config, loaded.step, loaded.state, None, loaded.extra)
    with loading.saved_checkpoints(workdir, key) as checkpoints:
        step = _step_of(checkpoints, step)
        if not (checkpoints.directory / str(step) / TRAINING).is_dir():
            raise ValueError(
                f"--moments: {key} has no optimizer's state, only a model; must be none"
            )
        restored = checkpoints.restore(step, to_items(abstract_state(config)))
    state = from_items(restored.items)
    return _Source(config, step, ModelState(state.params, state.other), state, restored.extra)


def _step_of(checkpoints: Checkpoints, step: int | None) -> int:
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise ValueError(f"--step={step}: no such checkpoint; there are {steps}")
    return steps[-1] if step is None else step


def _write(made: Path, source: Path, config: Config, entry: dict[str, Any]) -> None:
    """Writes all but the checkpoint."""
    config = workdirs.with_absolute_paths(config)
    json_files.write(made / workdirs.CONFIG, to_config_dict(config).to_dict())
    if (source / workdirs.TOKENIZER).is_file():
        files.copy(source / workdirs.TOKENIZER, made / workdirs.TOKENIZER)
    if (source / KEPT).is_dir():
        files.copy_tree(source / KEPT, made / KEPT)
    json_files.write(made / workdirs.SURGERY, {"operations": [*history(source), entry]})


def history(workdir: Path) -> list[dict[str, Any]]:
    """The operations that made the model of a workdir, the first one first."""
    path = workdir / workdirs.SURGERY
    if not path.is_file():
        return []
    operations = json_files.read(path).get("operations")
    if not isinstance(operations, list):
        raise ValueError(f"{path}: operations={operations!r}: must be a list")
    return operations


def _extra(extra: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Files beside a checkpoint, with the running load of the new experts."""
    before = extra.get(_RUNNING_LOAD)
    if before is None:
        return extra
    after = None if outcome.load is None else outcome.load(np.array(before)).tolist()
    return {**extra, _RUNNING_LOAD: after}
