"""A run that goes on with another config: longer, past batches that it cannot digest, slower.

Some keys say by step what happens from there on.  They may change while a run is on its way, as
long as its past stays what it was: then its config, from the beginning, gives the run that there
is.  A change of steps that have been made needs the user's word: the run goes back to the newest
checkpoint before it.

WORKDIR/history/00000001/ and so on hold what there was before each change:

config.json        the config until then
change.json        the keys that changed, the checkpoint that the run went on from, and those that
                   were removed
metrics.jsonl, evaluation.json    of a run that went back: its whole log and its results
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsmoe_jax.config import Config, differences, to_config_dict
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.workdir import (
    CHANGES_BY_STEP,
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    HISTORY,
    METRICS,
    read_config,
    read_evaluation,
)
from dsmoe_jax.storage import files

CHANGE = "change.json"


def first_changed(there: Config, here: Config) -> int:
    """The first step that another config makes otherwise, or that only one of the two makes.

    Args:
      there: config of a run.
      here: another, which differs in `CHANGES_BY_STEP`.

    Raises:
      ValueError: if a schedule would be another one from the beginning.
    """
    if there.train.scheduled_steps != here.train.scheduled_steps:
        had = there.train.scheduled_steps
        raise ValueError(
            f"train.steps={here.train.steps}: the run has {there.train.steps}, and the shares of"
            f" its schedules are of {had}; with train.schedule_steps={had} it goes on at its last"
            " rate, and with train.start_from a new run begins from its parameters"
        )
    steps = [min(there.train.steps, here.train.steps) + 1]
    for old, new in (
        (there.optimizer.rate_changes, here.optimizer.rate_changes),
        (there.train.skip_batches, here.train.skip_batches),
    ):
        steps += [int(step) for step, _ in set(old) ^ set(new)]
    rules = (there.train.spikes, here.train.spikes)
    if rules[0] != rules[1]:
        steps += [rule.from_step for rule in rules if rule is not None]
    return min(steps)


def prepare(directory: Path, there: Config, here: Config, *, go_back: bool) -> None:
    """Makes a workdir ready to go on with a config that differs in `CHANGES_BY_STEP`.

    The change is recorded, and checkpoints of the steps that are left are removed.

    Args:
      directory: of the run, which this process has claimed.
      there: its config.
      here: the config that it goes on with.
      go_back: whether steps that have been made may be left.

    Raises:
      ValueError: if the change is of steps that have been made, unless `go_back` says that they
        may be left; if no checkpoint is old enough.  Nothing was changed then.
    """
    changed = {
        key: list(pair) for key, pair in differences(there, here).items() if key in CHANGES_BY_STEP
    }
    if not changed:
        return
    first = first_changed(there, here)
    saved = saved_steps(directory)
    left = [step for step in saved if step >= first]
    kept = [step for step in saved if step < first]
    results = read_evaluation(directory)
    made = max([*left, 0 if results is None else results["step"]], default=0)
    if made >= first and not (go_back and kept):
        advice = "no checkpoint is older: choose another directory"
        if kept:
            advice = f"--go_back removes what came after step {kept[-1]} and goes on from there"
        raise ValueError(
            f"--workdir={directory}: {', '.join(changed)} would change step {first}, and the run is"
            f" at step {made}; {advice}"
        )
    change = {"changed": changed, "from_step": kept[-1] if kept else 0, "removed": left}
    _record(directory, there, change, with_results=made >= first)
    # In this order: a run that is killed in between finds the old config, and does the rest again.
    for step in reversed(left):
        files.remove_tree(directory / CHECKPOINTS / str(step))
    if made >= first:
        (directory / EVALUATION).unlink(missing_ok=True)


def takes_a_step(directory: Path, config: Config) -> bool:
    """Whether the run in a workdir has a step left with this config.

    It only looks, before the workdir is claimed.  Where the config changes by step, the run may
    have to go back, which is not worked out here: then it is taken to have one.

    Args:
      directory: of the run, which may not be there yet.
      config: that it is to go on with.

    Raises:
      ValueError: if its config or its results are damaged.
    """
    if not (directory / CONFIG).exists():
        return True
    if CHANGES_BY_STEP & set(differences(read_config(directory), config)):
        return True
    results = read_evaluation(directory)
    made = [*saved_steps(directory), 0 if results is None else results["step"]]
    return max(made) < config.train.steps


def saved_steps(directory: Path) -> list[int]:
    """The steps whose checkpoints are whole, oldest first."""
    found = [p for p in (directory / CHECKPOINTS).glob("*") if p.name.isdecimal()]
    return sorted(int(path.name) for path in found if files.is_whole(path))


def _record(directory: Path, there: Config, change: dict[str, Any], *, with_results: bool) -> None:
    number = 1 + sum(1 for _ in (directory / HISTORY).glob("*"))
    entry = directory / HISTORY / f"{number:08}"
    entry.mkdir(parents=True)
    json_files.write(entry / CONFIG, to_config_dict(there).to_dict())
    json_files.write(entry / CHANGE, change)
    for name in (METRICS, EVALUATION) if with_results else ():
        if (directory / name).exists():
            files.copy(directory / name, entry / name)
