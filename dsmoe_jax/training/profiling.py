"""Traces a few steps of a run for xprof and TensorBoard: `--profile=STEPS`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsmoe_jax.storage import files

# Steps of a call before the first one that is traced: compilation, and caches that fill.
WARM_UP = 3


class Profiler:
    """Traces steps of one call of `train`; without `n_steps` it does nothing.

    Args:
      directory: gets `plugins/profile/DATE/HOST.xplane.pb`, as TensorBoard's profile plugin and
        xprof look for it; each process of a run writes its own.
      n_steps: how many; None is none.
      first: the last step before this call.
      last: the last step of the run.
      message: gets the line that says where the trace is.

    Raises:
      ValueError: if the run has not so many steps left.
    """

    def __init__(
        self,
        directory: Path,
        n_steps: int | None,
        first: int,
        last: int,
        message: Callable[[str], None],
    ):
        self._directory = directory
        self._message = message
        self._steps = range(0)
        self._running = False
        self._written = contextlib.ExitStack()  # what is traced, where it belongs
        if n_steps is None:
            return
        left = last - first - WARM_UP
        if not 1 <= n_steps <= left:
            raise ValueError(
                f"--profile={n_steps}: must be 1 to {max(left, 0)}, the steps that are left after"
                f" step {first} and {WARM_UP} more in which the run warms up"
            )
        self._steps = range(first + WARM_UP + 1, first + WARM_UP + 1 + n_steps)

    def step(self, step: int, before: Any) -> contextlib.AbstractContextManager[Any]:
        """The context in which a step is handed to the device; begins the trace at its first step.

        Args:
          step: that is handed over.
          before: the state that it begins with: the trace begins when that is there.
        """
        if step not in self._steps:
            return contextlib.nullcontext()
        if not self._running:
            jax.block_until_ready(before)
            folder = self._written.enter_context(files.local_stand_in(self._directory))
            jax.profiler.start_trace(folder)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after its last step, whose result is `state`."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that has begun, however far it is."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._written.close()
            first, last = self._steps[0], self._steps[-1]
            self._message(f"profile of steps {first} to {last}: xprof --logdir={self._directory}")
