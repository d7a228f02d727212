"""The speeds of a run: tokens and operations a second, times of steps, the hosts' own time."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax.sharding import Mesh

from dsmoe_jax.config import Config, tokens_after
from dsmoe_jax.hardware.peak import peak_flops
from dsmoe_jax.model.size import train_flops_per_token
from dsmoe_jax.training.clock import DeviceClock
from dsmoe_jax.training.host_times import HostTimes


class Speeds:
    """Measures a call of `train`, between one row of the log and the next.

    Args:
      config: of the run.
      mesh: of the run.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self._config = config
        self._clock = DeviceClock()
        self._host_times = HostTimes(mesh)
        self._last_row = 0

    def begin(self, step: int) -> None:
        """Counts from a step on, which the run begins or goes on with."""
        self._last_row = step
        self.restart()

    def restart(self) -> None:
        """Leaves out the time until the next step: of an evaluation, which is no training."""
        self._clock.restart()

    def spent(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Counts the seconds inside as time of this host, see host_times.py."""
        return self._host_times.spent(key)

    def dispatched(self, output: jax.Array) -> None:
        """A step was just handed to the device; `output` is one of its results."""
        self._clock.dispatched(output)
        self._host_times.step()

    def gather(self) -> Any:
        """Begins to gather the hosts' times; to be fetched, then `row`."""
        return self._host_times.gather()

    def row(self, step: int, stage: Config, gathered: Any) -> dict[str, Any]:
        """Keys of metrics.jsonl: speeds since the last row.

        On a machine whose peak is unknown there is no share of it.

        Args:
          step: that the row is of.
          stage: config of its stage.
          gathered: the hosts' times, fetched.
        """
        seconds, idle = self._clock.lap()
        tokens = tokens_after(self._config, step) - tokens_after(self._config, self._last_row)
        self._last_row = step
        flops = tokens * train_flops_per_token(stage) / seconds
        row: dict[str, Any] = {"tokens_per_second": tokens / seconds, "flops_per_second": flops}
        if (peak := peak_flops()) is not None:
            row["flops_utilization"] = flops / peak
        row["overhead"] = idle / seconds
        if steps := self._clock.percentiles():
            row["step_seconds"] = steps
        return row | self._host_times.row(gathered)

    def close(self) -> None:
        """Ends the clock's thread."""
        self._clock.close()
