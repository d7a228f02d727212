"""Plans of an experiment: what its runs cost and how they are launched, before any is trained."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

from dsmoe_jax.config import Config, overrides, tokens_after, trees
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.model import size
from dsmoe_jax.planning import planner
from dsmoe_jax.study import fairness, measures
from dsmoe_jax.study.cells import Cell, Options, make_cells
from dsmoe_jax.study.experiment import Arm, Experiment, ProbeArm


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
    trained: dict[Path, Cell] = {cell.trained or cell.workdir: cell for cell in cells}
    return [_plan(cell, workdir, options, hardware) for workdir, cell in trained.items()]


def _plan(cell: Cell, workdir: Path, options: Options, hardware: Hardware) -> PlannedArm:
    arm = cell.arm
    if isinstance(arm, ProbeArm):
        arm = arm.experiment.arm(arm.trained)
    assert isinstance(arm, Arm), "a probe measures a model that was trained"
    config = cell.config
    sizes = measures.sizes(config)
    tokens = tokens_after(config, config.train.steps)
    flops = size.train_flops_per_token(config) * tokens
    plan = _mesh(config, hardware)
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
        command=_command(arm, config, workdir, options, plan),
    )


def _mesh(config: Config, hardware: Hardware) -> planner.Plan:
    """The mesh of the config if it has one, else the planner's; for the stage with most work."""
    stage = size.most_work(config).config
    if config.mesh != MeshConfig():
        if hardware.chips is None:
            raise ValueError("--chips: missing; a mesh in the config needs their number")
        return planner.examine(stage, hardware.chip, hardware.chips)
    if hardware.chips is None:
        return planner.propose_fewest(stage, hardware.chip)
    return planner.propose(stage, hardware.chip, hardware.chips)[0]


def _command(arm: Arm, config: Config, workdir: Path, options: Options, plan: planner.Plan) -> str:
    """The `train` command of the run, in the workdir where the experiment looks for it."""
    values = dict(trees.flatten(trees.to_tree(config)))
    changes = {
        **arm.overrides,
        **options.overrides,
        **{key: values[key] for key in arm.multiples},
        "train.seed": config.train.seed,
    }
    if config.data.corpus is None:
        changes["data.corpus"] = "CORPUS"  # the user's own
    # Relative where --results is: the command is for another machine.
    below = workdir.relative_to(local_path("--results", options.results))
    words = [
        f"--config={arm.config_file(options.scale)}",
        f"--workdir={Path(options.results) / below}",
        *(f"--config.{overrides.write(key, value)}" for key, value in changes.items()),
        *planner.flags(plan),
    ]
    return "python -m dsmoe_jax train " + " ".join(map(shlex.quote, words))
