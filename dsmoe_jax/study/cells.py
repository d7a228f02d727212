"""The runs of an experiment: their arms, seeds, configs and workdirs."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from dsmoe_jax.config import Config
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.study.experiment import AnyArm, Experiment, ProbeArm


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
    """

    scale: str
    seeds: int | None = None
    results: str = "runs"
    arms: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    report_only: bool = False

    def directory(self, experiment: Experiment) -> pathlib.Path:
        """Directory of the runs of an experiment."""
        return local_path("--results", self.results) / f"{experiment.name}-{self.scale}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of an experiment: an arm with a seed.

    Attributes:
      arm, seed: of the run.
      config: of the run; for a probe, of the run that trained the model.
      measured: config of the measured model; for a probe, as the intervention changes it.
      workdir: of this run alone.
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
      ValueError: for an unknown arm, fewer than one seed, or an impossible override.
    """
    seeds = experiment.seeds[options.scale] if options.seeds is None else options.seeds
    if seeds < 1:
        raise ValueError(f"--seeds={seeds}: must be at least 1")
    arms = chosen(experiment, options.arms)
    return [_cell(experiment, arm, seed, options) for seed in range(seeds) for arm in arms]


def _cell(experiment: Experiment, arm: AnyArm, seed: int, options: Options) -> Cell:
    config = arm.run_config(options.scale, seed, options.overrides)
    directory = options.directory(experiment) / arm.slug / f"seed{seed}"
    measured = arm.measured_config(config)
    return Cell(arm, seed, config, measured, directory, _trained(arm, seed, options))


def _trained(arm: AnyArm, seed: int, options: Options) -> pathlib.Path | None:
    if not isinstance(arm, ProbeArm):
        return None
    slug = arm.experiment.arm(arm.trained).slug
    return options.directory(arm.experiment) / slug / f"seed{seed}"


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
    parts += [shlex.quote(f"--arms={','.join(options.arms)}")] if options.arms else []
    parts += [shlex.quote(f"--set={key}={value}") for key, value in options.overrides.items()]
    return " ".join(parts)
