"""The checkpoints of a run: which of them are kept, and how often the time allows one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe_jax.config import Config
from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs import events
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.runs.events import Journal
from dsmoe_jax.training.rows import steps_of_lowest_loss
from dsmoe_jax.training.run_log import RunLog
from dsmoe_jax.training.start import TrainState, to_items


class SaveTimer:
    """Says when the next checkpoint may be written, so that all of them take a share of the time.

    The optimal interval grows with the square root of the cost and of the time between failures
    (Young 1974, Daly 2006); nobody knows the latter in advance, so the share is what is set.

    Args:
      share: of the time, between 0 and 1; None: never.
      now: a clock in seconds.
    """

    def __init__(self, share: float | None, now: Callable[[], float] = time.perf_counter):
        self._share = share
        self._now = now
        self._last = now()
        self._cost = 0.0  # so that the first one, whose cost is not known, comes at once

    def is_due(self) -> bool:
        """Whether one may be written now."""
        if self._share is None:
            return False
        return self._now() - self._last >= self._cost / self._share

    def saved(self, seconds: float) -> None:
        """One was written now, and training stood still for so many seconds."""
        self._cost, self._last = seconds, self._now()


class Saver:
    """Writes the state of a run, and says where it is.

    Args:
      config: of the run.
      directory: its workdir.
      log: whose rows up to a checkpoint must not get lost.
      journal: gets the events.

    Attributes:
      checkpoints: of the run.
      timer: says when the time allows one.
      saved_step: that of the newest checkpoint.
    """

    def __init__(self, config: Config, directory: Path, log: RunLog, journal: Journal):
        train = config.train
        self.checkpoints = Checkpoints(
            directory / workdirs.CHECKPOINTS, train.keep_checkpoints, train.keep_every
        )
        self.timer = SaveTimer(train.checkpoint_share)
        self.saved_step = 0
        self._n_best = train.keep_best
        self._log = log
        self._journal = journal

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Saves the state after a step.

        Args:
          step: updates made.
          state: after them.
          extra: what is saved beside it (JSON).

        Raises:
          OSError: naming the file, if the disk is full.
        """
        began = time.perf_counter()
        self._log.flush()  # the run may go on from here, and would not write its rows again
        self.checkpoints.save(step, to_items(state), extra, self._best_steps())
        self.saved_step = step
        self.timer.saved(time.perf_counter() - began)
        self._journal.add(events.CHECKPOINT)

    def stopped(self, step: int, why: str) -> str:
        """The error of a run that must not go on after a step, with its last good checkpoint."""
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        good = f"step {saved[-1]}, in {self.checkpoints.directory}" if saved else "none"
        return (
            f"step {step}: {why}; stopped. Last good checkpoint: {good}; see --help for"
            " how to go on past a spike"
        )

    def _best_steps(self) -> list[int]:
        """The steps before this one with the lowest held-out loss, as many as are to be kept."""
        if self._n_best is None:
            return []
        saved = self.checkpoints.steps()
        best = hosts.on_first(lambda: steps_of_lowest_loss(self._log.rows))
        return [step for step in best if step in saved][: self._n_best]
