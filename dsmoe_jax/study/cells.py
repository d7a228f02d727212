"""The runs of an experiment: their arms, seeds, configs and workdirs.

A model is trained once for all experiments that have it: the workdir of a run follows from its
config, RESULTS/models-SCALE/CONFIG/seedN, where CONFIG is the config's name and, if options, the
arm or `--set` change keys of the plain config file, a digest of the changes.  RESULTS/NAME-SCALE
has the results of one experiment, and the measurements of its probes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from dsmoe_jax import config as config_lib
from dsmoe_jax.config import Config
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.runs import workdir
from dsmoe_jax.study.experiment import AnyArm, Arm, Experiment, config_of_file


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an experiment's command line.

    Attributes:
      scale: a key of the experiment's `seeds`, such as "demo".
      seeds: their number; None is the experiment's own for the scale.
      results: directory under which `NAME-SCALE` is made.
      arms: labels or directory names; () is all.
      overrides: dotted config keys to change in every arm.
      report_only: whether to report the existing runs without training or probing.
      minutes: time to spend: as many seeds as fit, at least one and at most `seeds`; None is
        without a limit.
      cell: number of the only run to make, in the order of `make_cells`; None is all.
    """

    scale: str
    seeds: int | None = None
    results: str = "runs"
    arms: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    report_only: bool = False
    minutes: float | None = None
    cell: int | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"--seeds={self.seeds}: must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes={self.minutes:g}: must be above 0")
        if self.minutes is not None and self.cell is not None:
            raise ValueError(f"--cell={self.cell}: one run, which has no --minutes")

    def directory(self, experiment: Experiment) -> pathlib.Path:
        """Directory of the results of an experiment."""
        return local_path("--results", self.results) / f"{experiment.name}-{self.scale}"

    @property
    def models(self) -> pathlib.Path:
        """Directory of the trained models of all experiments."""
        return local_path("--results", self.results) / f"models-{self.scale}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of an experiment: an arm with a seed.

    Attributes:
      arm, seed: of the run.
      config: of the run; for a probe, of the run that trained the model.
      measured: config of the measured model; for a probe, as the intervention changes it.
      workdir: of this run; experiments that train the same model share it.
      trained: workdir of the run that a probe measures; None if the arm is trained here.
    """

    arm: AnyArm
    seed: int
    config: Config
    measured: Config
    workdir: pathlib.Path
    trained: pathlib.Path | None = None

    @property
    def record(self) -> pathlib.Path:
        """The file beside the workdir with the data and machine of the run, see `runner.py`."""
        return self.workdir.with_suffix(".json")

    def __str__(self) -> str:
        return f"{self.arm.label}, seed {self.seed}"


def make_cells(experiment: Experiment, options: Options) -> list[Cell]:
    """All runs in the order in which they are made: the first seed of every arm, then the next.

    Raises:
      ValueError: for an unknown arm, or an impossible override.
    """
    seeds = experiment.seeds[options.scale] if options.seeds is None else options.seeds
    arms = chosen(experiment, options.arms)
    return [_cell(experiment, arm, seed, options) for seed in range(seeds) for arm in arms]


def _cell(experiment: Experiment, arm: AnyArm, seed: int, options: Options) -> Cell:
    config = arm.run_config(options.scale, seed, options.overrides)
    measured = arm.measured_config(config)
    if isinstance(arm, Arm):
        directory = options.models / _model(arm, options.scale, config) / f"seed{seed}"
        return Cell(arm, seed, config, measured, directory)
    model = arm.experiment.arm(arm.trained)
    assert isinstance(model, Arm), "a probe measures a model that was trained"
    trained = options.models / _model(model, options.scale, config) / f"seed{seed}"
    directory = options.directory(experiment) / arm.slug / f"seed{seed}"
    return Cell(arm, seed, config, measured, directory, trained)


def _model(arm: Arm, scale: str, config: Config) -> str:
    """Directory name of a model: of its config, with a digest of what differs from the plain file.

    Keys that may change while a run is on its way make no other model, nor does a corpus that has
    moved.
    """
    plain = dataclasses.replace(arm, options="").config_file(scale)
    file = config_of_file(plain)
    there, here = map(workdir.with_absolute_paths, (file, config))
    changes = {
        key: value
        for key, (_, value) in config_lib.differences(there, here).items()
        if key not in ("name", "train.seed", workdir.MOVED) and not workdir.may_change(key, config)
    }
    if not changes:
        return config.name
    text = json.dumps(changes, sort_keys=True)
    return f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def chosen(experiment: Experiment, names: tuple[str, ...]) -> list[AnyArm]:
    """The arms of these labels or directory names, in the order of the experiment; () is all."""
    known = {name: arm for arm in experiment.arms for name in (arm.label, arm.slug)}
    for name in names:
        if name not in known:
            slugs = ", ".join(arm.slug for arm in experiment.arms)
            raise ValueError(f"--arms={name}: no such arm; there are {slugs}")
    wanted = {known[name] for name in names} if names else set(experiment.arms)
    return [arm for arm in experiment.arms if arm in wanted]


def shell_command(experiment: Experiment, options: Options) -> str:
    """The command line that runs an experiment with these options."""
    parts = [f"python -m {experiment.module} --scale={options.scale}"]
    parts += [f"--seeds={options.seeds}"] if options.seeds is not None else []
    parts += [f"--minutes={options.minutes:g}"] if options.minutes is not None else []
    parts += [shlex.quote(f"--arms={','.join(options.arms)}")] if options.arms else []
    parts += [shlex.quote(f"--set={key}={value}") for key, value in options.overrides.items()]
    return " ".join(parts)
