"""The status of a workdir: what it is, how far, how fast, how long still, and what went wrong.

It is read from files alone, whatever state they are in, and no device is touched: on a TPU host,
where a device has one process, a run is not disturbed.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.config import Config, from_saved, tokens_after
from dsmoe_jax.model import size
from dsmoe_jax.runs import claims, events, json_files, metrics_log, troubles, workdir
from dsmoe_jax.runs.checkpoint import find_damage
from dsmoe_jax.storage import files
from dsmoe_jax.storage.away import Away
from dsmoe_jax.storage.places import place_of

STATES = {
    "empty": "nothing was trained here",
    "foreign": "holds no run",
    "damaged": "a run whose files cannot all be read",
    "fresh": "a run that has not made a step yet",
    "model": "a model that was not trained here",
    "running": "a run that a process is training now",
    "stopped": "a run that was asked to stop, and has saved",
    "failed": "a run that ended with an error",
    "dead": "a run that ended without a word: killed, or its machine is gone",
    "finished": "a run that is trained and evaluated",
}
RECENT = 20  # rows whose median is the speed of now


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is there: its step, when it was written (seconds since 1970), its bytes."""

    step: int
    time: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Status:
    """Status of one workdir; None is what it does not have, or not yet.

    Attributes:
      workdir: absolute.
      state: a name in `STATES`.
      says: a line about the state, such as the process, or the error.
      name: of the config, with its scale.
      parameters, activated: of the model.
      step, steps: updates made, and of the whole run.
      tokens, all_tokens: the same in tokens.
      loss, validation_loss: the last ones, in nats per token.
      tokens_per_second, flops_utilization: medians of the last rows.
      step_seconds: percentiles {p50, p95, p99} of the last row.
      seconds_left: at this speed, of a run that is not finished.
      last_change: when a row or an event was written last, in seconds since 1970.
      checkpoints: oldest first.
      troubles: sentences, see troubles.py.
      events: the last ones, see events.py.
    """

    workdir: str
    state: str
    says: str = ""
    name: str | None = None
    parameters: float | None = None
    activated: float | None = None
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    all_tokens: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    flops_utilization: float | None = None
    step_seconds: dict[str, float] | None = None
    seconds_left: float | None = None
    last_change: float | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    troubles: tuple[str, ...] = ()
    events: tuple[dict[str, Any], ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether a process is training it."""
        return self.state == "running"


def read_status(path: str | Path) -> Status:
    """The status of a workdir.

    Raises:
      ValueError: if there is no such directory.
      Away: if it is in a bucket that does not answer.
    """
    directory = place_of("--workdir", path)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise ValueError(f"--workdir={path}: {what}; must be the workdir of a run")
    if not (directory / workdir.CONFIG).is_file():
        return _without_run(directory)
    try:
        config, _ = from_saved(json_files.read(directory / workdir.CONFIG))
    except Away:
        raise
    except (ValueError, OSError, RecursionError) as error:
        says = f"{workdir.CONFIG} is not the config of a run of this version: {_one_line(error)}"
        return Status(str(directory), "damaged", says)
    damage: list[str] = []
    try:
        rows = metrics_log.read_rows(directory)
    except (ValueError, OSError) as error:
        rows = []
        damage.append(_one_line(error))
    return of_run(directory, config, rows, damage)


def of_run(
    directory: Path, config: Config, rows: list[dict[str, Any]], damage: list[str]
) -> Status:
    """The status of a run whose config and rows have been read.

    Args:
      directory: its workdir.
      config: of the run.
      rows: of metrics.jsonl, those of one step joined or not.
      damage: sentences about files that could not be read.
    """
    log = events.read_events(directory)
    checkpoints, broken = _checkpoints(directory)
    damage = [*damage, *broken]
    evaluation = None
    try:
        evaluation = workdir.read_evaluation(directory)
    except (ValueError, OSError) as error:
        damage.append(_one_line(error))
    trained = [row for row in rows if "loss" in row]
    steps = [0, *(row["step"] for row in trained), *(c.step for c in checkpoints)]
    step = max(steps)
    process = claims.holder(directory)
    finished = evaluation is not None and evaluation["step"] == config.train.steps
    state, says = _state(process, finished, bool(damage), step, bool(rows), log)
    account = size.account(config)
    speed = _median(trained, "tokens_per_second")
    tokens, whole = tokens_after(config, step), tokens_after(config, config.train.steps)
    last = trained[-1] if trained else {}
    validated = [row["validation_loss"] for row in rows if "validation_loss" in row]
    changes = [event["time"] for event in log[-1:]]
    metrics = directory / workdir.METRICS
    changes += [files.modified(metrics)] if metrics.exists() else []
    scale = "" if config.scale == "paper" else f":{config.scale}"
    status = Status(
        workdir=str(directory),
        state=state,
        says=says,
        name=config.name + scale,
        parameters=account["total"],
        activated=account["activated"],
        step=step,
        steps=config.train.steps,
        tokens=tokens,
        all_tokens=whole,
        loss=last.get("loss"),
        validation_loss=validated[-1] if validated else None,
        tokens_per_second=speed,
        flops_utilization=_median(trained, "flops_utilization"),
        step_seconds=last.get("step_seconds"),
        seconds_left=(whole - tokens) / speed if speed and not finished else None,
        last_change=max(changes, default=None),
        checkpoints=checkpoints,
        events=tuple(log),
    )
    found = damage + troubles.find(trained, log)
    if status.is_running:
        found += troubles.silent(trained, time.time() - (status.last_change or time.time()))
    return dataclasses.replace(status, troubles=tuple(found))


def _state(
    process: str | None,
    finished: bool,
    damaged: bool,
    step: int,
    has_rows: bool,
    log: list[dict[str, Any]],
) -> tuple[str, str]:
    """The name of the state, and what is to be said of it."""
    again = "the same command goes on from the last checkpoint"
    last = log[-1] if log else {}
    if process is not None:
        return "running", f"by process {process}"
    if damaged:
        return "damaged", STATES["damaged"]
    if finished:
        return "finished", ""
    if step and not has_rows and not log:
        return "model", "converted, or made by surgery: there is a model, and no training"
    match last.get("event"):
        case events.STOPPED:
            return "stopped", f"by {last.get('signal')} after step {last.get('step')}; {again}"
        case events.FAILED:
            return "failed", f"{last.get('error')}"
    if step == 0 and not has_rows:
        return "fresh", STATES["fresh"]
    return "dead", f"no process holds it, and it has not said why; {again}"


def _without_run(directory: Path) -> Status:
    """The status of a directory without a config."""
    inside = sorted(path.name for path in directory.iterdir())
    ours = {".lock", f".{workdir.CONFIG}.tmp"}
    if not set(inside) - ours:
        return Status(str(directory), "empty", "a new run may begin here")
    runs = [name for name in inside if (directory / name / workdir.CONFIG).is_file()]
    if runs:
        shown = ", ".join(runs[:5]) + (", ..." if len(runs) > 5 else "")
        return Status(str(directory), "foreign", f"it holds {len(runs)} workdirs: {shown}")
    if {workdir.METRICS, workdir.CHECKPOINTS} & set(inside):
        says = f"{workdir.CONFIG} is missing: bring it back, or nobody knows of what model this is"
        return Status(str(directory), "damaged", says)
    if workdir.EVALUATION in inside:
        return Status(str(directory), "foreign", "results of a probe of another run's model")
    says = f"it holds {inside[0]!r} but no {workdir.CONFIG}"
    return Status(str(directory), "foreign", says)


def _checkpoints(directory: Path) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """The whole checkpoints, and sentences about the others."""
    found, broken = [], []
    folder = directory / workdir.CHECKPOINTS
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.isdecimal():
            continue
        if (damage := find_damage(path)) is not None:
            broken.append(f"{workdir.CHECKPOINTS}/{path.name}: {damage}")
            continue
        try:
            if not files.is_whole(path):  # it is being written
                continue
            n_bytes = sum(files.sizes(path).values())
            found.append(Checkpoint(int(path.name), files.modified(path), n_bytes))
        except FileNotFoundError:  # the run has just pruned it
            continue
    return tuple(sorted(found, key=lambda checkpoint: checkpoint.step)), broken


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    """The median of the last rows; None if none has the key."""
    values = [row[key] for row in rows[-RECENT:] if key in row]
    return float(np.median(values)) if values else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
