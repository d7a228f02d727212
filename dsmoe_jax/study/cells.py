"""The runs of an experiment: which there are, with what config, and where they are kept."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from dsmoe_jax.config import Config
from dsmoe_jax.study.experiment import AnyArm, Experiment, ProbeArm


@dataclasses.dataclass(frozen=True)
class Options:
    """How an experiment is run.

    Attributes:
      scale: a key of the experiment's `seeds`, such as "demo".
      seeds: how many; None is what the experiment says for the scale.
      results: directory under which `NAME-SCALE` is made.
      arms: labels or directory names; () is all.
      overrides: dotted config keys to change in every arm.
      report_only: train and probe nothing; read what there is.
    """

    scale: str
    seeds: int | None = None
    results: str = "runs"
    arms: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    report_only: bool = False

    def directory(self, experiment: Experiment) -> pathlib.Path:
        """Where the runs of an experiment are."""
        return pathlib.Path(self.results).expanduser() / f"{experiment.name}-{self.scale}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of an experiment: an arm, a seed, and where it is kept.

    Attributes:
      arm, seed: which.
      config: of the run; of a probe, of the run that trained the model.
      measured: the config of the model that is measured; of a probe, as the intervention makes it.
      workdir: of its own.
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
        """The file beside the workdir that says on what the run was made, see `runner.py`."""
        return self.workdir.with_suffix(".json")

    def __str__(self) -> str:
        return f"{self.arm.label}, seed {self.seed}"


def make_cells(experiment: Experiment, options: Options) -> list[Cell]:
    """All runs in the order in which they are made: the first seed of every arm, then the next.

    Raises:
      ValueError: for an unknown arm, fewer than one seed, or an override that does not fit.
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
    """The command line that runs this."""
    parts = [f"python -m {experiment.module} --scale={options.scale}"]
    parts += [f"--seeds={options.seeds}"] if options.seeds is not None else []
    parts += [f"--arms={','.join(options.arms)}"] if options.arms else []
    parts += [f"--set={key}={value}" for key, value in options.overrides.items()]
    return " ".join(parts)
