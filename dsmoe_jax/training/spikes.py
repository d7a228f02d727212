"""Loss spikes: a rule that sees them, and what it does about them (`train.spikes`).

A step is a spike if its loss (or the norm of its gradient) lies far above the steps before it:

    deviations = (value - median) / (1.4826 median |x - median|)    over the last `window` values x

exceeds `threshold`; a value that is not finite always does.  1.4826 makes the scale that of a
normal distribution's standard deviation.  Median and scale, unlike mean and deviation, stay what
they are when a spike is among the values.

The judgement is part of the compiled step: all processes come to the same one, and with `skip` the
update of the very step is left out: parameters, moments and router variables keep every bit.  Data
and schedule go on.  With `rewind` the run goes back to its newest checkpoint and leaves out what it
has read since: the parameters before a spike are often at fault as well.

The window is saved with a checkpoint, as are the decisions: a run that is killed comes to the same
ones again.  It begins anew with a stage, whose losses may be of another size.

Shapes: W steps of the window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsmoe_jax.config import Config, replace, stage_of, tokens_after
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.train import SpikesConfig
from dsmoe_jax.parallel import sharding

_NORMAL = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
# Of the median: the least scale.  Losses that hardly differ would make a spike of every ripple.
_LEAST_SCALE = 1e-3


class Action(NamedTuple):
    """The remedy for a spike: the step's update is left out, or the run goes back."""

    skips: bool = False
    rewinds: bool = False


ACTIONS: dict[str, Action] = {
    "warn": Action(),
    "skip": Action(skips=True),
    "rewind": Action(rewinds=True),
}


class TooManySpikes(ValueError):
    """The rule acts again and again: another remedy is needed."""


class SpikeWindow(NamedTuple):
    """The values that a step is compared with, on the device.

    Attributes:
      values_W: the last ones, float32, in a ring.
      n: int32, how many have come in.
      in_a_row: int32, steps that were skipped without one in between that was not.
    """

    values_W: jax.Array
    n: jax.Array
    in_a_row: jax.Array


class Judged(NamedTuple):
    """The judgement on a step.

    Attributes:
      is_spike: bool.
      value, median, deviations: float32; the last is NaN until the window is full.
      in_a_row: as in `SpikeWindow`, after the step.
    """

    is_spike: jax.Array
    value: jax.Array
    median: jax.Array
    deviations: jax.Array
    in_a_row: jax.Array


def check(config: Config) -> None:
    """Refuses an action that does not exist.

    Raises:
      ValueError: naming those that do.
    """
    rule = config.train.spikes
    if rule is not None:
        names = ", ".join(ACTIONS)
        require(rule.action in ACTIONS, "train.spikes.action", rule.action, f"must be {names}")


def first_window(config: Config) -> SpikeWindow | None:
    """An empty window; None for a run without a rule."""
    rule = config.train.spikes
    if rule is None:
        return None
    return SpikeWindow(jnp.zeros(rule.window, jnp.float32), jnp.int32(0), jnp.int32(0))


def judge(
    rule: SpikesConfig, window: SpikeWindow, step: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> tuple[Judged, SpikeWindow]:
    """Judges a step, and takes its value into the window unless it is skipped.

    Args:
      rule: of the run.
      window: before the step.
      step: int32, updates made before it.
      loss, grad_norm: of the step.
    """
    value = grad_norm if rule.watch == "grad_norm" else loss
    median = jnp.median(window.values_W)
    scale = _NORMAL * jnp.median(jnp.abs(window.values_W - median))
    scale = jnp.maximum(scale, _LEAST_SCALE * jnp.abs(median))
    is_full = window.n >= rule.window
    deviations = jnp.where(is_full, (value - median) / scale, jnp.nan)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    acts = step + 1 >= rule.from_step
    is_spike = acts & (~finite | (deviations > rule.threshold))
    skipped = is_spike & ACTIONS[rule.action].skips
    in_a_row = jnp.where(skipped, window.in_a_row + 1, 0)
    enters = acts & finite & ~skipped
    place = window.n % rule.window
    values_W = window.values_W.at[place].set(jnp.where(enters, value, window.values_W[place]))
    n = window.n + enters
    return Judged(is_spike, value, median, deviations, in_a_row), SpikeWindow(values_W, n, in_a_row)


def unless(skipped: jax.Array, before: Any, after: Any) -> Any:
    """The state after a step, or before it if its update is left out.

    The schedule counts on: the rate is that of the step's number, as the log says.
    """

    def choose(old: Any, new: Any) -> Any:
        return new if _is_schedule(new) else jnp.where(skipped, old, new)

    return jax.tree.map(choose, before, after, is_leaf=_is_schedule)


def _is_schedule(x: Any) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)


class Decisions:
    """The decisions of a run: what it has skipped and left out so far.

    Attributes:
      skipped: the steps whose updates were left out.
      left_out: batches that are left out of the data, by the step before which.
    """

    def __init__(self, config: Config):
        self._config = config
        self._rule = config.train.spikes
        self._rewinds: tuple[int, int] = (0, 0)  # to which step, how often
        self.skipped: list[int] = []
        self.left_out: dict[int, int] = {}

    @property
    def action(self) -> Action:
        """Action of the rule."""
        return Action() if self._rule is None else ACTIONS[self._rule.action]

    def config(self) -> Config:
        """The config of the run, with what is left out of its data."""
        if not self.left_out:
            return self._config
        numbers = {step: number for step, number in self._config.train.skip_batches}
        for step, number in self.left_out.items():
            numbers[step] = numbers.get(step, 0) + number
        return replace(self._config, **{"train.skip_batches": tuple(sorted(numbers.items()))})

    def skip(self, step: int, judged: Judged) -> None:
        """Notes that a step was skipped.

        Raises:
          TooManySpikes: if so many were in a row.
        """
        assert self._rule is not None
        self.skipped.append(step)
        if judged.in_a_row >= self._rule.limit:
            raise TooManySpikes(
                f"step {step}: {int(judged.in_a_row)} steps in a row are spikes"
                f" (train.spikes.limit={self._rule.limit}); see --help for how to go on past them"
            )

    def rewind(self, step: int, to: int) -> None:
        """Leaves out the data of the steps after `to`, up to a spike in `step`.

        Raises:
          TooManySpikes: if it went back to that step so often already.
        """
        assert self._rule is not None
        times = 1 + (self._rewinds[1] if self._rewinds[0] == to else 0)
        if times > self._rule.limit:
            raise TooManySpikes(
                f"step {step}: a spike again after {times - 1} returns to step {to}, each with"
                f" other data (train.spikes.limit={self._rule.limit}); see --help for how to go on"
                " past it"
            )
        self._rewinds = (to, times)
        tokens = tokens_after(self._config, step) - tokens_after(self._config, to)
        batch = stage_of(self._config, to + 1).config.tokens_per_step
        self.left_out[to + 1] = self.left_out.get(to + 1, 0) + -(-tokens // batch)

    def row(self) -> dict[str, int]:
        """Keys of metrics.jsonl: what was skipped and left out so far."""
        if self._rule is None:
            return {}
        return {"skipped_steps": len(self.skipped), "left_out_batches": sum(self.left_out.values())}

    def saved(self, window: SpikeWindow | None) -> dict[str, Any] | None:
        """For the checkpoint (JSON); None without a rule."""
        if window is None:
            return None
        values_W, n, in_a_row = jax.device_get(window)
        return {
            "window": [float(value) for value in values_W],
            "n": int(n),
            "in_a_row": int(in_a_row),
            "skipped": self.skipped,
            "left_out": sorted(self.left_out.items()),
        }

    def restore(self, saved: dict[str, Any] | None) -> SpikeWindow | None:
        """Takes up the decisions of a checkpoint; returns its window, replicated on the mesh.

        A checkpoint from before the rule, or of another window, gives an empty one.
        """
        if saved is not None:
            self.skipped = list(saved["skipped"])
            # Those of this call since then, after going back, stay.
            self.left_out = {int(step): n for step, n in saved["left_out"]} | self.left_out
        if self._rule is None:
            return None
        if saved is None or len(saved["window"]) != self._rule.window:
            saved = {"window": [0.0] * self._rule.window, "n": 0, "in_a_row": 0}
        arrays = (
            np.array(saved["window"], np.float32),
            np.array(saved["n"], np.int32),
            np.array(saved["in_a_row"], np.int32),
        )
        return SpikeWindow(*jax.device_put(arrays, sharding.whole()))


def details(step: int, judged: Judged) -> dict[str, Any]:
    """Details of the event of a spike."""
    return {
        "spike_step": step,
        "value": float(judged.value),
        "median": float(judged.median),
        "deviations": float(judged.deviations),
    }
