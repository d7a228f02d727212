"""The runs of an experiment: their arms, seeds, configs and workdirs.

A model is trained once for all experiments that have it: the workdir of a run follows from its
config, RESULTS/models-SCALE/CONFIG/seedN, where CONFIG is the config's name and, if options, the
arm or `--set` change keys of the plain config file, a digest of the changes.  RESULTS/NAME-SCALE
has the results of one experiment, and the measurements of its probes.

A run that begins with another one, or learns from it, has the workdir of that in its config, or of
what surgery makes of it, which lies beside the run's own: seedN-KEY/1_OPERATION.  Neither the name
of a model nor the digest of a config depends on where the results are.
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
      config: of the run; for a probe, of the run that trained the model.  Keys that name runs which
        it needs have their descriptions, see `launched`.
      measured: config of the measured model; for a probe, as the intervention changes it.
      workdir: of this run; experiments that train the same model share it.
      probed: the run that a probe measures; None if the arm is trained here.
      needs: config keys, and the finished runs that training needs for them.
    """

    arm: AnyArm
    seed: int
    config: Config
    measured: Config
    workdir: pathlib.Path
    probed: Cell | None = None
    needs: Mapping[str, Cell] = dataclasses.field(default_factory=dict)

    @property
    def trained(self) -> pathlib.Path | None:
        """Workdir of the run that a probe measures; None if the arm is trained here."""
        return None if self.probed is None else self.probed.workdir

    @property
    def launched(self) -> Config:
        """The config with which the run is trained: it has the workdirs of the runs it needs."""
        paths = {key: str(self.needed(key)) for key in self.needs}
        return config_lib.replace(self.config, **paths)

    def needed(self, key: str) -> pathlib.Path:
        """The workdir, or file in it, that is the value of a key in `needs`."""
        assert isinstance(self.arm, Arm), "a probe needs no other run"
        workdir = [self.needs[key].workdir, *self.made(key)][-1]
        return workdir / self.arm.from_runs[key].file

    def made(self, key: str) -> list[pathlib.Path]:
        """The workdirs that surgery makes of a run in `needs`, one an operation, in order."""
        assert isinstance(self.arm, Arm), "a probe needs no other run"
        folder = self.workdir.with_name(f"{self.workdir.name}-{key}")
        operations = self.arm.from_runs[key].operations
        return [folder / f"{i}_{name}" for i, (name, _) in enumerate(operations, start=1)]

    @property
    def before(self) -> tuple[Config, ...]:
        """Configs of all runs that are trained before this one, each once."""
        return tuple(self._before().values())

    def _before(self) -> dict[pathlib.Path, Config]:
        if self.probed is not None:
            return self.probed._before()
        found: dict[pathlib.Path, Config] = {}
        for cell in self.needs.values():
            found |= {**cell._before(), cell.workdir: cell.config}
        return found

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
        directory = options.models / _model(arm, options, config) / f"seed{seed}"
        return Cell(arm, seed, config, measured, directory, needs=_needs(arm, seed, options))
    model = arm.experiment.arm(arm.trained)
    assert isinstance(model, Arm), "a probe measures a model that was trained"
    probed = _cell(arm.experiment, model, seed, options)
    directory = options.directory(experiment) / arm.slug / f"seed{seed}"
    return Cell(arm, seed, config, measured, directory, probed)


def _needs(arm: Arm, seed: int, options: Options) -> dict[str, Cell]:
    """The finished runs that an arm needs, by key; none where `--set` names a workdir."""
    overrides = arm.passed_on(options.scale, options.overrides)
    passed_on = dataclasses.replace(options, overrides=overrides)
    return {
        key: _cell(run.experiment, run.arm, seed, passed_on)
        for key, run in arm.needs(options.overrides).items()
    }


def _model(arm: Arm, options: Options, config: Config) -> str:
    """Directory name of a model: of its config, with a digest of what differs from the plain file.

    Keys that may change while a run is on its way make no other model, nor does a corpus that has
    moved.  A run that it needs counts by its description, wherever it lies.
    """
    plain = dataclasses.replace(arm, options="").config_file(options.scale)
    file = config_of_file(plain)
    there, here = map(workdir.with_absolute_paths, (file, config))
    changes = {
        key: value
        for key, (_, value) in config_lib.differences(there, here).items()
        if key not in ("name", "train.seed", workdir.MOVED) and not workdir.may_change(key, config)
    }
    changes |= {key: str(run) for key, run in arm.needs(options.overrides).items()}
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
