"""The directory of a run: its lock, its config, and the names of what lies in it.

config.json       the run's config
metrics.jsonl     one JSON object a line, see metrics_log.py
checkpoints/      one directory a kept step, see checkpoint.py
tensorboard/      event files
routing/          with train.record_routing: the experts of every token, see routing_records.py
evaluation.json   held-out results after the last step: the run is finished
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_jax.config import (
    Config,
    Stage,
    differences,
    from_config_dict,
    stages_of,
    to_config_dict,
)
from dsmoe_jax.config.mesh import AXES
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.parallel import hosts

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
EVALUATION = "evaluation.json"
ROUTING = "routing"
_LOCK = ".lock"

# These keys may change between two calls of one run: they do not touch the numbers being trained,
# but for the order in which they are added up.  Other hardware needs another mesh, and a mesh needs
# other micro-batches and buffers: to divide the batch, and to fit.
_MAY_CHANGE = frozenset(f"mesh.{axis}" for axis in AXES) | {
    "model.remat",
    "model.moe.dispatch.buffer_factor",
    "model.moe.dispatch.chunks",
    "train.accumulation_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.eval_batches",
}


def may_change(key: str, config: Config) -> bool:
    """Whether a run goes on with another value of a dotted key, or of its column of stages.

    Micro-batches are part of the model where their tokens compete for places.
    """
    key = key.removeprefix("train.stages.")
    if key == "train.accumulation_steps" and any(map(_competes, stages_of(config))):
        return False
    return key in _MAY_CHANGE


def _competes(stage: Stage) -> bool:
    moe = stage.config.model.moe
    if moe.n_routed_experts == 0:
        return False
    return bool(moe.drop or moe.evaluation_drop or get_router(moe)[0].competes)


@contextlib.contextmanager
def claim(workdir: str | Path, config: Config) -> Iterator[Path]:
    """Makes or re-enters a workdir and keeps every other trainer out of it meanwhile.

    Of several processes of one run the first does so, on a file system that all share.

    Raises:
      ValueError: if it cannot be written, is another program's directory, holds a run with another
        config, or is in use.  Nothing in it was changed then.
    """
    directory = Path(workdir).expanduser().absolute()
    with contextlib.ExitStack() as claimed:
        hosts.on_first(lambda: claimed.enter_context(_claimed(directory, config)))
        yield directory


@contextlib.contextmanager
def _claimed(directory: Path, config: Config) -> Iterator[None]:
    _refuse_foreign(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / _LOCK, "a+")  # noqa: SIM115 - held below
    except OSError as error:
        raise ValueError(f"--workdir={directory}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"--workdir={directory}: in use by process {lock.read().strip() or 'unknown'};"
                " wait for it or choose another directory"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        if (directory / CONFIG).exists() and (directory / METRICS).exists():
            _refuse_other(directory, config)  # a run that never took a step holds nothing to lose
        write_json(directory / CONFIG, to_config_dict(config).to_dict())
        yield


def read_config(workdir: str | Path, key: str | None = None) -> Config:
    """The config of the run in a workdir.

    Args:
      workdir: of the run.
      key: what the user calls it, with its value, for errors; None is --workdir.

    Raises:
      ValueError: if there is none, or it cannot be read.
    """
    path = Path(workdir).expanduser().absolute() / CONFIG
    if not path.exists():
        key = key or f"--workdir={path.parent}"
        raise ValueError(f"{key}: holds no run (there is no {CONFIG})")
    try:
        return from_config_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: not the config of a run of this version: {error}") from error


def write_json(path: Path, tree: Any) -> None:
    """Replaces a file as a whole: a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(tree, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_evaluation(workdir: str | Path) -> dict[str, Any] | None:
    """The held-out results of a finished run; None before it is finished."""
    path = Path(workdir) / EVALUATION
    return json.loads(path.read_text()) if path.exists() else None


def _refuse_foreign(directory: Path) -> None:
    if (directory / CONFIG).exists():
        read_config(directory)  # refuses that of another program, which may have the same name
        return
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"--workdir={directory}: is a file; must be a directory")
    ours = {_LOCK, f".{CONFIG}.tmp"}  # left by a run that was killed before its config was written
    foreign = sorted(p.name for p in directory.iterdir() if p.name not in ours)
    if foreign:
        raise ValueError(
            f"--workdir={directory}: holds {foreign[0]!r} but no run (no {CONFIG});"
            " choose a new or empty directory"
        )


def _refuse_other(directory: Path, config: Config) -> None:
    changed = differences(read_config(directory), config)
    changed = {key: pair for key, pair in changed.items() if not may_change(key, config)}
    if changed:
        listing = "; ".join(
            f"{key}: {old!r} there, {new!r} here" for key, (old, new) in changed.items()
        )
        raise ValueError(
            f"--workdir={directory}: holds a run with another config ({listing});"
            " choose another directory"
        )
