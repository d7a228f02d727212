"""A stage of a run at work: its data, its compiled step, its evaluation.

A run without stages is one stage.
"""

from __future__ import annotations

import functools
from typing import Any

from dsmoe_jax.config import Config, Stage, replace, stages_of, trees
from dsmoe_jax.config.stages import without_stages
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.mixture import mixture_of
from dsmoe_jax.data.pipeline import Batch, train_batches
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.model.block import compute_dtype
from dsmoe_jax.model.build import abstract_model
from dsmoe_jax.moe import experts, kernels
from dsmoe_jax.nn import attention
from dsmoe_jax.nn.feed_forward import form_of
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs import routing_records
from dsmoe_jax.runs.routing_records import Recorder, Recording
from dsmoe_jax.training.start import shapes_by_path, state_shapes
from dsmoe_jax.training.step import jit_train_step
from dsmoe_jax.training.teacher import Teacher


def check_stages(config: Config) -> None:
    """Refuses stages in which the state would have other shapes than in the others.

    Raises:
      ValueError: naming the key and an array, and as `state_shapes` does.
    """
    whole = without_stages(config)
    wanted = shapes_by_path(state_shapes(whole))
    for stage in stages_of(config):
        found = shapes_by_path(state_shapes(stage.config))
        if found == wanted:
            continue
        path = next(p for p in {**wanted, **found} if wanted.get(p) != found.get(p))
        columns = config.train.stages or {}
        keys = [key for key in columns if key.startswith("model.")]
        values = dict(trees.flatten(trees.to_tree(stage.config)))
        guilty = [key for key in keys if _changes(whole, key, values.get(key), wanted)]
        key = (guilty or keys)[0]
        outside = dict(trees.flatten(trees.to_tree(whole))).get(key)
        raise ValueError(
            f"train.stages.{key}={columns[key]}: changes the shape of {path} from that of"
            f" {key}={outside!r} outside the stages, cannot change during a run"
        )


def attention_kernel(config: Config) -> str | None:
    """The attention kernel of a stage on the ambient mesh; None if its attention calls none.

    Raises:
      ValueError: for a kernel that cannot compute it, saying which one can.
    """
    dtype = compute_dtype(config.model)
    return attention.kernel_of(config.model.attention, config.data.sequence_length, dtype)


def kernels_of(config: Config) -> dict[str, str]:
    """The kernels that a stage uses on the ambient mesh, by what they compute."""
    dtype = compute_dtype(config.model)
    moe = config.model.moe
    found = {}
    if (attends := attention_kernel(config)) is not None:
        found["attention"] = attends
    if moe.n_routed_experts:
        quantised = moe.quantised is not None
        found["experts"] = experts.choose_name(
            moe.expert_backend, dtype, form_of(moe.expert), quantised=quantised
        )
        found["rows"] = kernels.choose_rows_name(moe.row_kernels, dtype)
    return found


def check_kernels(config: Config) -> None:
    """Refuses a run with a kernel that the platform, or a stage's sequences, do not allow.

    Raises:
      ValueError: as `attention_kernel`.
    """
    for stage in stages_of(config):
        attention_kernel(stage.config)


def _changes(config: Config, key: str, value: Any, wanted: dict[str, Any]) -> bool:
    """Whether a key by itself gives the state other shapes."""
    try:
        return shapes_by_path(state_shapes(replace(config, **{key: value}))) != wanted
    except ValueError:  # possible only together with another key
        return True


class StageRun:
    """A stage that is being trained, on the ambient mesh.

    Attributes:
      stage: of the run.
      train_step: `(state, batch) -> (state, metrics)`, compiled at its first call.
      held_out: evaluates with the stage's model.
      mixture: of the domains of the whole run; None without weights.
    """

    def __init__(
        self,
        stage: Stage,
        corpus: Corpus,
        position: dict[str, Any] | None = None,
        recorder: Recorder | None = None,
        recording: Recording | None = None,
        teacher: Teacher | None = None,
    ):
        """Makes the stage ready; nothing is compiled yet.

        Args:
          stage: of the run.
          corpus: its data.
          position: in the data, of a run that goes on.
          recorder: of the routing of held-out text.
          recording: routing to replay.
          teacher: of the run.
        """
        config = stage.config
        train = config.train
        self.stage = stage
        self.mixture = mixture_of(stage, corpus)
        self._rows = sharding.local_rows(train.global_batch_size)
        self._batches = train_batches(
            corpus.directory,
            config.data.sequence_length,
            train.global_batch_size,
            train.seed,
            self._rows,
            (stage.first, stage.sequences),
            stage.skips,
            config.model.moe.router.tasks,
            self.mixture,
        )
        if position is not None:
            self._batches.set_state(position)
        micro_batch = train.global_batch_size // train.accumulation_steps
        self._recording = recording if routing_records.needs(config) else None
        self.held_out = HeldOut(
            abstract_model(config.model),
            corpus,
            micro_batch,
            train.eval_batches,
            recorder,
            recording if routing_records.needs(config) == "routing" else None,
            keep_routing=train.analyse_every is not None,
            tasks=config.model.moe.router.tasks,
        )
        bytes_V = corpus.bytes_per_token_V
        if teacher is None:
            self.train_step = jit_train_step(config, bytes_V)
        else:  # its arrays are an input: as constants they would be a part of the program
            step = jit_train_step(config, bytes_V, teacher.model)
            self.train_step = functools.partial(step, teacher=teacher.state)

    def next_batch(self, step: int) -> Batch:
        """The batch of a step, which is the next one."""
        batch = next(self._batches)
        batch_size = self.stage.config.train.global_batch_size
        if self._recording is not None:
            batch |= self._recording.read(routing_records.TRAIN, step, batch_size, self._rows)
        return sharding.global_batch(batch, self._rows, batch_size)

    def take_compiled(self, other: StageRun) -> None:
        """Takes over what another one, of the same stage and mesh, has compiled."""
        assert (self.stage.first, self.stage.end) == (other.stage.first, other.stage.end)
        self.train_step = other.train_step
        self.held_out = other.held_out

    def position(self) -> dict[str, Any]:
        """Position in the data: batches taken since the beginning of the run."""
        return self._batches.get_state()
