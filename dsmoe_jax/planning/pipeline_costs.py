"""Costs of a pipeline, by arithmetic: what each stage keeps, what it sends, how long it idles.

Shapes: S stages, R repeats, n micro-batches of a step, T tokens of one of them on a chip, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import layout
from dsmoe_jax.parallel.pipeline import Schedule

_COMPUTE = 2  # bytes of an activation
_STATE = 4  # bytes of a parameter, and of its gradient
# Waiting micro-batches of the first stage, and their gradients; the loop has each of them twice.
_WAITING = 4


class Course(NamedTuple):
    """The course of a step's micro-batches through the stages; one stage is no pipeline.

    Attributes:
      stages: S.
      micro_batches: n.
      schedule: of those that pass together.
    """

    stages: int
    micro_batches: int
    schedule: Schedule

    @classmethod
    def of(cls, stages: int, micro_batches: int, schedule: Schedule | None) -> Course:
        """The course of a step; without a schedule all micro-batches pass together."""
        if stages == 1:  # one after the other
            return cls(1, micro_batches, Schedule(1))
        return cls(stages, micro_batches, schedule or Schedule(micro_batches))

    @property
    def ticks(self) -> float:
        """Ticks of all forward passes of a step, in micro-batches that pass a whole stage."""
        rounds = self.micro_batches / self.schedule.micro_batches
        return rounds * self.schedule.ticks(self.stages) / self.schedule.repeats

    @property
    def idle(self) -> float:
        """Share of its time in which a stage has nothing to do."""
        return self.schedule.bubble(self.stages)

    @property
    def gathers_once(self) -> bool:
        """Whether the experts of all layers of a stage are gathered before its first tick.

        With one repeat they do not depend on the tick: JAX takes that out of the loop over ticks,
        in the forward pass, and so keeps them all.
        """
        return self.stages > 1 and self.schedule.repeats == 1

    @property
    def spared_ticks(self) -> float:
        """Those of `ticks` in whose forward pass experts need not be gathered."""
        rounds = self.micro_batches / self.schedule.micro_batches
        return self.ticks - rounds if self.gathers_once else 0.0

    def layers_kept(self, layers: int) -> float:
        """Times that one chip keeps one of the stacked layers for the backward pass."""
        ticks = self.schedule.ticks(self.stages) / self.schedule.repeats
        return layers / self.stages * ticks

    def leading_kept(self, model: ModelConfig) -> float:
        """As `layers_kept`, of the leading dense layers: outside of the pipeline."""
        return layout.n_leading(model) * self.schedule.micro_batches / self.stages

    def memory(self, t: float, d: int) -> dict[str, float]:
        """Bytes of the micro-batches that wait for the first stage."""
        if self.stages == 1:
            return {}
        return {"waiting micro-batches": _WAITING * self.schedule.micro_batches * _COMPUTE * t * d}

    def traffic(self, t: float, d: int, local_stacked: float) -> dict[str, float]:
        """Bytes that a chip receives in a step from other stages.

        Args:
          t: T.
          d: D.
          local_stacked: its parameters of the stacked layers, for the exchange by repeats.
        """
        if self.stages == 1:
            return {}
        vector = _COMPUTE * t * d
        repeats = self.schedule.repeats
        rounds = self.micro_batches / self.schedule.micro_batches
        elsewhere = 1 - 1 / self.stages
        passed = 2 * self.ticks * repeats * vector
        # To the first stage and back, in both passes.
        spread = 4 * self.micro_batches * vector * elsewhere
        moved = 2 * rounds * _STATE * local_stacked * elsewhere if repeats > 1 else 0.0
        return {"stages": passed + spread, "repeats": moved}
