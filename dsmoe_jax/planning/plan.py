"""A plan: a mesh for a config, with its costs for each chip."""

from __future__ import annotations

import dataclasses
import math

from dsmoe_jax.config import Config
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.parallel.pipeline import Schedule
from dsmoe_jax.planning.roofline import Roofline, roofline


@dataclasses.dataclass(frozen=True)
class Plan:
    """A mesh with its costs for each chip.

    Attributes:
      sizes: of the mesh's axes.
      accumulation_steps: number of micro-batches of a step.
      memory: GB by category.
      traffic: GB that each chip receives in one step, by category.
      hbm: GB that one step moves in the memory of each chip, by category.
      slices: of the devices.
      sliced: GB that each chip receives from other slices in one step, by category.
      schedule: of the micro-batches that pass together through the stages; None without stages.
    """

    sizes: dict[str, int]
    accumulation_steps: int
    memory: dict[str, float]
    traffic: dict[str, float]
    hbm: dict[str, float]
    schedule: Schedule | None = None
    slices: int = 1
    sliced: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def used(self) -> float:
        """GB of memory."""
        return sum(self.memory.values())

    @property
    def moved(self) -> float:
        """GB received in a step inside of the slice."""
        return sum(self.traffic.values())

    def bounds(self, config: Config, chip: str) -> Roofline:
        """Bounds of the time of a step."""
        chips = math.prod(self.sizes.values())
        hbm = sum(self.hbm.values())
        bounds = roofline(
            config,
            chips,
            CHIPS[chip],
            moved_gb=hbm,
            received_gb=self.moved,
            sliced_gb=sum(self.sliced.values()),
        )
        return bounds.with_idle(self.idle)

    @property
    def idle(self) -> float:
        """Share of a step in which a chip waits for other stages: the bubble."""
        return 0.0 if self.schedule is None else self.schedule.bubble(self.sizes["stage"])


def flags(plan: Plan) -> list[str]:
    """The flags of `train` that give it the mesh and the micro-batches of a plan."""
    meshes = [f"--config.mesh.{axis}={size}" for axis, size in plan.sizes.items()]
    if plan.slices > 1:
        meshes.append(f"--config.mesh.slices={plan.slices}")
    numbers = {"accumulation_steps": plan.accumulation_steps}
    if plan.schedule is not None:
        numbers["pipeline_micro_batches"] = plan.schedule.micro_batches
        numbers["pipeline_repeats"] = plan.schedule.repeats
    return [*meshes, *(f"--config.train.{name}={n}" for name, n in numbers.items())]


def shape(sizes: dict[str, int]) -> str:
    """A mesh in words: "fsdp 8 x expert 8"."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one chip"


def listing(costs: dict[str, float]) -> str:
    """Costs by category in words: "parameters 1.20, moments 2.40"."""
    return ", ".join(f"{name} {gb:.2f}" for name, gb in costs.items())
