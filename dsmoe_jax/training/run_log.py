"""The log of a run while it trains: its rows, and those who look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from dsmoe_jax.config import Config, tokens_after
from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs.metrics_log import KERNELS, MetricsLog, NoLog
from dsmoe_jax.training.rows import RunningLoad, mixture_row, training_row
from dsmoe_jax.training.stages import StageRun
from dsmoe_jax.training.step import StepMetrics


class Watch(Protocol):
    """Somebody who looks at a run, such as the writer of its page, see report/live.py."""

    def look(self, directory: Path, config: Config, rows: list[dict[str, Any]]) -> None:
        """A row was written: the last one."""

    def close(self) -> None:
        """The run has ended, well or not; its events say how."""


class RunLog:
    """The rows of a run, which the first process writes.

    Args:
      config: of the run.
      directory: its workdir.
      watch: is shown the rows as they come, by the first process; None: nobody looks.
      wandb: a project of Weights & Biases that gets the rows too.

    Attributes:
      kernels: that the first row of a start and of a stage names, until it is written.
      running_load: of the last steps.
    """

    def __init__(self, config: Config, directory: Path, watch: Watch | None, wandb: str | None):
        self.kernels: dict[str, str] = {}
        self.running_load = RunningLoad()
        self._config = config
        self._directory = directory
        self._watch = watch if hosts.is_first() else None
        self._wandb = wandb
        self._log: MetricsLog | None = None

    def open(self, step: int) -> None:
        """Opens the log, cut off after the step that the run goes on from."""
        is_first = hosts.is_first()
        self._log = MetricsLog(self._directory, step, self._wandb) if is_first else NoLog()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; of another process than the first those of this call."""
        assert self._log is not None
        return self._log.rows

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row that is not of a training step.

        Raises:
          OSError: naming the file, if the disk is full.
        """
        assert self._log is not None
        self._log.write(row)

    def write_step(
        self, step: int, metrics: StepMetrics, stage: StageRun, *more: dict[str, Any]
    ) -> None:
        """Adds the row of a training step and shows it; raises like `write`.

        Args:
          step: its number.
          metrics: fetched from the device.
          stage: that it belongs to.
          *more: keys of the row.
        """
        row: dict[str, Any] = {"step": step, "tokens": tokens_after(self._config, step)}
        row |= training_row(metrics, stage.stage.config.model) | self.running_load.row()
        for keys in more:
            row |= keys
        row |= mixture_row(stage.mixture, step, self.rows)
        if self.kernels:
            row[KERNELS] = self.kernels
            self.kernels = {}
        self.write(row)
        if self._watch is not None:
            self._watch.look(self._directory, self._config, self.rows)

    def flush(self) -> None:
        """Makes sure that a kill takes no row; raises like `write`."""
        assert self._log is not None
        self._log.flush()

    def close(self) -> None:
        """Flushes and closes the log, if it was opened; raises like `write`."""
        if self._log is not None:
            self._log.close()
