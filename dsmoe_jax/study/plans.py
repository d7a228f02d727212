"""Plans of an experiment: what its runs cost and how they are launched, before any is trained."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

from dsmoe_jax.config import Config, ModelConfig, overrides, tokens_after, trees
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.model import size
from dsmoe_jax.planning import planner
from dsmoe_jax.study import fairness, made_models, readings
from dsmoe_jax.study.cells import Cell, Options, make_cells
from dsmoe_jax.study.experiment import Arm, Experiment
from dsmoe_jax.training.teacher import TEACHER


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The chips that an experiment is planned for.

    Attributes:
      chip: a name in `CHIPS`.
      chips: their number; None is for each arm the fewest, a power of two, on which it fits.
      utilisation: share of the chip's peak FLOP/s that training is taken to reach.
    """

    chip: str
    chips: int | None = None
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        planner.check_chip(self.chip)
        if not 0 < self.utilisation <= 1:
            raise ValueError(
                f"--utilisation={self.utilisation}: must be a share above 0, at most 1"
            )


@dataclasses.dataclass(frozen=True)
class PlannedArm:
    """Cost and launch of the run of an arm with one seed.

    Attributes:
      label: of the arm.
      config: of the run.
      parameters, activated: numbers of parameters, see `model/size.py`.
      tokens: that it is trained on.
      flops: of the whole training.
      plan: mesh and micro-batches.
      chip_hours: chips times hours.
      command: the command line that trains it.
      preparation: the command lines of surgery that make what it begins with, in order.
      needs: modules of the experiments whose finished runs it begins with, or learns from.
    """

    label: str
    config: Config
    parameters: float
    activated: float
    tokens: int
    flops: float
    plan: planner.Plan
    chip_hours: float
    command: str
    preparation: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def chips(self) -> int:
        """Their number."""
        return math.prod(self.plan.sizes.values())


def plan_arms(experiment: Experiment, options: Options, hardware: Hardware) -> list[PlannedArm]:
    """Plans the arms that are trained; in place of probes the models that they measure.

    Args:
      experiment: to plan.
      options: scale, arms and overrides.
      hardware: to train on.

    Raises:
      ValueError: if the comparison is not fair, or an arm does not fit the chips.
    """
    cells = [cell for cell in make_cells(experiment, options) if cell.seed == 0]
    fairness.check_configs(experiment, cells)
    trained = [cell.probed or cell for cell in cells]
    once = {cell.workdir: cell for cell in trained}
    return [_plan(cell, options, hardware) for cell in once.values()]


def _plan(cell: Cell, options: Options, hardware: Hardware) -> PlannedArm:
    arm = cell.arm
    assert isinstance(arm, Arm), "a probe measures a model that was trained"
    config = cell.config
    sizes = readings.sizes(config)
    tokens = tokens_after(config, config.train.steps)
    flops = size.train_flops_per_token(config) * tokens
    plan = _mesh(config, hardware, _teacher(cell))
    speed = hardware.utilisation * CHIPS[hardware.chip].peak_flops
    return PlannedArm(
        label=arm.label,
        config=config,
        parameters=sizes["total"],
        activated=sizes["activated"],
        tokens=tokens,
        flops=flops,
        plan=plan,
        chip_hours=flops / speed / 3600,
        command=_command(arm, cell, options, plan),
        preparation=tuple(line for key in cell.needs for line in _surgery(cell, key, options)),
        needs=tuple(arm.from_runs[key].experiment.module for key in cell.needs),
    )


def _teacher(cell: Cell) -> ModelConfig | None:
    """The model of a run's teacher, before the operations that it may go through."""
    needed = cell.needs.get(TEACHER)
    return None if needed is None else needed.config.model


def _mesh(config: Config, hardware: Hardware, teacher: ModelConfig | None) -> planner.Plan:
    """The mesh of the config if it has one, else the planner's; for the stage with most work."""
    stage = size.most_work(config).config
    if config.mesh.is_chosen:
        if hardware.chips is None:
            raise ValueError("--chips: missing; a mesh in the config needs their number")
        return planner.examine(stage, hardware.chip, hardware.chips, teacher)
    if hardware.chips is None:
        return planner.propose_fewest(stage, hardware.chip, teacher)
    return planner.propose(stage, hardware.chip, hardware.chips, teacher)[0]


def _command(arm: Arm, cell: Cell, options: Options, plan: planner.Plan) -> str:
    """The `train` command of the run, in the workdir where the experiment looks for it."""
    config = cell.config
    values = dict(trees.flatten(trees.to_tree(config)))
    changes = {
        **arm.overrides,
        **arm.at_scale(options.scale),
        **options.overrides,
        **{key: values[key] for key in arm.multiples},
        "train.seed": config.train.seed,
        **{key: _written(cell.needed(key), options) for key in cell.needs},
    }
    if config.data.corpus is None:
        changes["data.corpus"] = "CORPUS"  # the user's own
    words = [
        f"--config={arm.config_file(options.scale)}",
        f"--workdir={_written(cell.workdir, options)}",
        *(f"--config.{overrides.write(key, value)}" for key, value in changes.items()),
        *planner.flags(plan),
    ]
    return "python -m dsmoe_jax train " + " ".join(map(shlex.quote, words))


def _surgery(cell: Cell, key: str, options: Options) -> list[str]:
    """The `surgery` commands that make the workdir for a key of a run's config."""
    lines = []
    source = cell.needs[key].workdir
    operations = made_models.operations(cell, key)
    for place, (name, settings) in zip(cell.made(key), operations, strict=True):
        words = [
            f"--from={_written(source, options)}",
            f"--to={_written(place, options)}",
            f"--moments={made_models.MOMENTS}",
            *(f"--{option}={value}" for option, value in settings.items() if value is not None),
        ]
        lines.append(f"python -m dsmoe_jax surgery {name} " + " ".join(map(shlex.quote, words)))
        source = place
    return lines


def _written(path: Path, options: Options) -> str:
    """A path of the results: relative where --results is, since commands are for other machines."""
    below = path.relative_to(local_path("--results", options.results))
    return str(Path(options.results) / below)
