"""Measurements of a model while it trains, on held-out text.

An evaluation gives a row of the log; an analysis gives tables of what the experts serve, from the
same passes over the text.  Both are made once a step, however often a run is killed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe_jax.analysis import over_training
from dsmoe_jax.analysis.over_training import OverTraining
from dsmoe_jax.analysis.routed_text import with_routing
from dsmoe_jax.config import Config
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs import events, routing_records
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.events import Journal
from dsmoe_jax.training.rows import validation_row
from dsmoe_jax.training.run_log import RunLog
from dsmoe_jax.training.start import TrainState


class Measuring:
    """Evaluates and analyses the model of a run.

    Args:
      config: of the run.
      directory: its workdir.
      corpus: whose held-out text is read.
      log: gets the rows.
      journal: gets the events.
    """

    def __init__(
        self, config: Config, directory: Path, corpus: Corpus, log: RunLog, journal: Journal
    ):
        self._config = config
        self._corpus = corpus
        self._log = log
        self._journal = journal
        self._tables = OverTraining(directory / workdirs.ANALYSIS)

    def go_back(self, step: int) -> None:
        """Removes the tables past the step that the run goes on from."""
        if hosts.is_first():
            self._tables.go_back(step)

    def analyse(self, step: int, state: TrainState, held_out: HeldOut) -> None:
        """Writes tables of what the experts serve, unless they are there already.

        Raises:
          ValueError: if the tables of the step before cannot be read.
          OSError: naming the file, if the disk is full.
        """
        if hosts.on_first(lambda: step in self._tables.steps()):
            return
        text = with_routing(
            self._corpus,
            held_out.routings(state.params, state.other),
            self._config.model.moe.n_routed_experts,
            max_tokens=over_training.TOKENS,
        )

        def write() -> None:
            found = self._tables.compute(step, text)
            self._log.write({"step": step, **over_training.row(found)})
            self._log.flush()
            self._tables.finish(step, found)

        hosts.on_first(write)

    def evaluate(
        self, step: int, state: TrainState, held_out: HeldOut, after_batch: Callable[[int], None]
    ) -> dict[str, Any] | None:
        """Held-out results; None if the log has them already, unless it is the last step.

        Args:
          step: updates made.
          state: after them.
          held_out: of the stage.
          after_batch: is told how many batches are done.
        """
        rows = self._log.rows
        logged = hosts.on_first(
            lambda: any(r["step"] == step and "validation_loss" in r for r in rows)
        )
        if logged and step != self._config.train.steps:
            return None
        name = routing_records.validation_name(step)
        result = held_out.measure(state.params, state.other, after_batch, name)
        if not logged:
            self._log.write(validation_row(step, result))
            self._journal.add(events.EVALUATION, loss=result["loss"])
        return result
