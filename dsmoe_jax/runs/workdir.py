"""The directory of a run: its lock, its config, and the names of what lies in it.

config.json       the run's config
tokenizer.json    of its corpus: text can be generated where the corpus is not
metrics.jsonl     one JSON object a line, see metrics_log.py
events.jsonl      starts, stops, failures and what else happened, see events.py
checkpoints/      one directory a kept step, see checkpoint.py
tensorboard/      event files, and traces of --profile
history/          what was there before the config changed on the way, see going_on.py
routing/          with train.record_routing: the experts of every token, see routing_records.py
surgery.json      of a model that `surgery` made: the operations, the first one first
analysis/         with train.analyse_every: what the experts serve, see analysis/over_training.py
evaluation.json   held-out results after the last step: the run is finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsmoe_jax.config import (
    Config,
    Stage,
    differences,
    from_saved,
    replace,
    stages_of,
    to_config_dict,
    trees,
)
from dsmoe_jax.config.mesh import AXES
from dsmoe_jax.config.train import SpikesConfig
from dsmoe_jax.data.opening import locate
from dsmoe_jax.data.own_text import located
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs import claims, json_files
from dsmoe_jax.runs.claims import LOCK
from dsmoe_jax.runs.claims import InUse as InUse
from dsmoe_jax.storage.places import place_of

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
EVALUATION = "evaluation.json"
ROUTING = "routing"
HISTORY = "history"
SURGERY = "surgery.json"
ANALYSIS = "analysis"
# May change where the text is the same, which `train` looks at: the corpus has moved.
MOVED = "data.corpus"

# Paths, besides that of the corpus.
_PATHS = (
    "data.validation",
    "data.tokenizer",
    "train.start_from",
    "train.distillation.teacher",
    "train.replay_routing",
    "train.trainable.most_used_in",
)
# These keys may change between two calls of one run: they do not touch the numbers being trained,
# but for the order in which they are added up.  Other hardware needs another mesh, and a mesh needs
# other micro-batches and buffers: to divide the batch, and to fit.
_MAY_CHANGE = frozenset(f"mesh.{axis}" for axis in AXES) | {
    "mesh.fallbacks",
    "mesh.slices",
    "model.remat",
    "model.moe.dispatch.chunks",
    "train.accumulation_steps",
    "train.pipeline_micro_batches",
    "train.pipeline_repeats",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_share",
    "train.keep_best",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.eval_every",
    "train.eval_batches",
    "train.analyse_every",
}
# These say what happens from some step on: a run may go on with another value, see going_on.py.
CHANGES_BY_STEP = frozenset(
    {"optimizer.rate_changes", "train.schedule_steps", "train.skip_batches", "train.steps"}
) | {f"train.spikes.{field.name}" for field in dataclasses.fields(SpikesConfig)}


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


GoOn = Callable[[Path, Config, Config], None]  # (directory, config there, config here)


@contextlib.contextmanager
def claim(workdir: str | Path, config: Config, go_on: GoOn | None = None) -> Iterator[Path]:
    """Makes or re-enters a workdir and keeps every other trainer out of it meanwhile.

    Of several processes of one run the first does so, where all of them see it.

    Args:
      workdir: of the run.
      config: of the run.
      go_on: makes the directory ready for a config that differs in `CHANGES_BY_STEP`, or raises a
        ValueError; None refuses it.

    Raises:
      ValueError: if it cannot be written, is another program's directory or holds a run with
        another config, and `InUse`.  Nothing in it was changed then.
    """
    directory = place_of("--workdir", workdir)
    with contextlib.ExitStack() as claimed:
        hosts.on_first(lambda: claimed.enter_context(_claimed(directory, config, go_on)))
        yield directory


@contextlib.contextmanager
def _claimed(directory: Path, config: Config, go_on: GoOn | None) -> Iterator[None]:
    _refuse_foreign(directory)
    config = with_absolute_paths(config)
    with claims.held(directory):
        if _has_begun(directory):  # a run that never took a step holds nothing to lose
            _refuse_other(directory, config, CHANGES_BY_STEP if go_on else frozenset())
            there = read_config(directory)
            if go_on is not None:
                go_on(directory, there, config)
            # Until its text is seen to be the same.
            config = replace(config, **{MOVED: there.data.corpus})
        _write_config(directory, config)
        yield


def read_config(workdir: str | Path, key: str | None = None) -> Config:
    """The config of the run in a workdir.

    A key that was added after the run began has its default, and a line on stderr says so.

    Args:
      workdir: of the run.
      key: what the user calls it, with its value, for errors; None is --workdir.

    Raises:
      ValueError: if there is none, or it cannot be read.
    """
    path = place_of("--workdir", workdir) / CONFIG
    if not path.exists():
        key = key or f"--workdir={path.parent}"
        raise ValueError(f"{key}: holds no run (there is no {CONFIG})")
    wrong = f"{path}: not the config of a run of this version"
    tree = json_files.parse(path.read_bytes(), wrong)
    try:
        config, added = from_saved(tree)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wrong}: {error}") from error
    if added and hosts.is_first():
        defaults = ", ".join(f"{key}={value!r}" for key, value in added.items())
        _say_once(f"{path}: lacks keys that were added later, taken as {defaults}")
    return config


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def keep(directory: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Writes the config of a run whose corpus has been opened, and the tokenizer.

    Raises:
      OSError: naming the file, if one cannot be written.
    """
    _write_config(directory, with_absolute_paths(config))
    path = directory / TOKENIZER
    if not path.is_file() or path.read_bytes() != tokenizer.to_json().encode():
        json_files.write_text(path, tokenizer.to_json())


def _write_config(directory: Path, config: Config) -> None:
    json_files.write(directory / CONFIG, to_config_dict(config).to_dict())


def with_absolute_paths(config: Config) -> Config:
    """A copy whose paths mean the same from every folder.

    Raises:
      ValueError: naming the key, if one is not a path of a file system.
    """
    paths: dict[str, str] = {}
    if config.data.corpus is not None:
        paths[MOVED] = locate(config.data.corpus)
    values = dict(trees.flatten(trees.to_tree(config)))
    for key in _PATHS:
        if values.get(key) is not None:  # no key of a section that is None has a value
            is_text = key == "data.validation"  # it may be a dataset
            locate_one = located if is_text else _place
            paths[key] = locate_one(values[key], key)
    return replace(config, **paths)


def _place(written: str, key: str) -> str:
    return str(place_of(key, written))


def read_evaluation(workdir: str | Path, *needed: str) -> dict[str, Any] | None:
    """The held-out results of a finished run; None before it is finished.

    Args:
      workdir: of the run.
      *needed: numbers that they must have, besides the step.

    Raises:
      ValueError: naming the file, if it is damaged.
    """
    path = place_of("--workdir", workdir) / EVALUATION
    if not path.exists():
        return None
    found = json_files.read(path, null_is_nan=True)
    numbers = {key: found.get(key) for key in ("step", *needed)}
    domains = found.get("domains", {})
    if not isinstance(domains, dict) or not all(isinstance(x, dict) for x in domains.values()):
        raise ValueError(f"{path}: domains: must be a section with one for each domain")
    for name, row in domains.items():
        numbers[f"domains.{name}.bits_per_byte"] = row.get("bits_per_byte")
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {key}={value!r}: must be a number")
    return found


def _refuse_foreign(directory: Path) -> None:
    if (directory / CONFIG).exists():
        read_config(directory)  # refuses that of another program, which may have the same name
        return
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"--workdir={directory}: is a file; must be a directory")
    ours = {LOCK, f".{CONFIG}.tmp"}  # left by a run that was killed before its config was written
    foreign = sorted(p.name for p in directory.iterdir() if p.name not in ours)
    if foreign:
        raise ValueError(
            f"--workdir={directory}: holds {foreign[0]!r} but no run (no {CONFIG});"
            " choose a new or empty directory"
        )


def _has_begun(directory: Path) -> bool:
    """Whether a run has something to lose: rows, checkpoints, recorded routing or results."""
    if any((directory / name).exists() for name in (METRICS, EVALUATION)):
        return True
    return any(any((directory / name).glob("*")) for name in (CHECKPOINTS, ROUTING))


def _refuse_other(directory: Path, config: Config, allowed: frozenset[str]) -> None:
    found = changes(directory, config)
    changed = {key: pair for key, pair in found.items() if key not in allowed}
    if any((directory / CHECKPOINTS).glob("*")):  # which say of what text they are
        changed.pop(MOVED, None)
    if changed:
        listing = "; ".join(
            f"{key}: {old!r} there, {new!r} here" for key, (old, new) in changed.items()
        )
        raise ValueError(
            f"--workdir={directory}: holds a run with another config ({listing});"
            " choose another directory"
        )


def changes(directory: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which the run in a workdir differs from a config, without those that may.

    Returns:
      {key: (value there, value in the config)}, paths absolute.
    """
    there, here = map(with_absolute_paths, (read_config(directory), config))
    found = differences(there, here)
    return {key: pair for key, pair in found.items() if not may_change(key, config)}
