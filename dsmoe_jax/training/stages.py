"""What the steps of one stage are made with: its data, its compiled step, its evaluation.

A run without stages is one stage.
"""

from __future__ import annotations

from typing import Any

from dsmoe_jax.config import Stage
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.pipeline import Batch, train_batches
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs.routing_records import TRAIN, Recorder, Recording
from dsmoe_jax.training.step import abstract_model, jit_train_step


class StageRun:
    """A stage that is being trained, on the ambient mesh.

    Attributes:
      stage: which.
      train_step: `(state, batch) -> (state, metrics)`, compiled at its first call.
      held_out: evaluates with the stage's model.
    """

    def __init__(
        self,
        stage: Stage,
        corpus: Corpus,
        position: dict[str, Any] | None = None,
        recorder: Recorder | None = None,
        recording: Recording | None = None,
    ):
        """Makes the stage ready; nothing is compiled yet.

        Args:
          stage: of the run.
          corpus: its data.
          position: in the data, of a run that goes on.
          recorder: of the routing of held-out text.
          recording: routing to replay.
        """
        config, train = stage.config, stage.config.train
        self.stage = stage
        self._rows = sharding.local_rows(train.global_batch_size)
        self._batches = train_batches(
            corpus.directory,
            config.data.sequence_length,
            train.global_batch_size,
            train.seed,
            self._rows,
            (stage.first, stage.sequences),
        )
        if position is not None:
            self._batches.set_state(position)
        micro_batch = train.global_batch_size // train.accumulation_steps
        self._recording = recording
        self.held_out = HeldOut(
            abstract_model(config),
            corpus,
            micro_batch,
            train.eval_batches,
            recorder,
            recording if config.model.moe.router.name == "replay" else None,
        )
        self.train_step = jit_train_step(config, corpus.bytes_per_token_V)

    def next_batch(self, step: int) -> Batch:
        """The batch of a step, which is the next one."""
        batch, batch_size = next(self._batches), self.stage.config.train.global_batch_size
        if self._recording is not None:
            batch |= self._recording.read(TRAIN, step, batch_size, self._rows)
        return sharding.global_batch(batch, self._rows, batch_size)

    def position(self) -> dict[str, Any]:
        """How many batches of the run were taken; the same in every stage."""
        return self._batches.get_state()
