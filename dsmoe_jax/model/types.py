"""Inputs and results of a model, and the cache of generation.

Shapes: B sequences, S positions, L positions of a cache, D hidden, V vocabulary; of recorded
routing, L MoE layers and K activated experts; E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dsmoe_jax.model.mtp import Ahead
from dsmoe_jax.moe.report import LayerReport
from dsmoe_jax.moe.types import RecordedRouting

if TYPE_CHECKING:  # the input pipeline takes a second to import, and counting needs none
    from dsmoe_jax.data.pipeline import Batch


class ModelInputs(NamedTuple):
    """Inputs of a model; `ModelInputs(tokens_BS)` is evaluation on whole single documents.

    Attributes:
      tokens_BS: int32 token ids.
      segment_ids_BS: int32, the document of each token; 0 is padding.  A token attends only to its
        own document.  None: one document a sequence.
      positions_BS: int32, position within the document; None: 0, 1, 2, ..., with a cache the number
        of tokens before.
      sequence_ids_B: int32, the place of each sequence in the global batch; None: 0, 1, 2, ...
      rng: random key for routers that act at random in training; None is evaluation.
      replayed: recorded routing, (B, L, S, K), for routers that replay; in evaluation it replaces
        the choice of any router.  In training with `model.mtp`, its modules' routing comes last.
      left_out_LE: bool, the routed experts of each MoE layer that no token may choose: it takes its
        next best ones.  An array and no part of `Intervention`, so that other experts need no
        compilation; `interventions.check_left_out` says which may be left out.  Only in evaluation,
        and not in the modules of `model.mtp`.  None: none.
      task_ids_BS: int32, the task of each token's document, its place in `model.moe.router.tasks`,
        for routers by task; any number on padding.  None: not known.
    """

    tokens_BS: jax.Array
    segment_ids_BS: jax.Array | None = None
    positions_BS: jax.Array | None = None
    sequence_ids_B: jax.Array | None = None
    rng: jax.Array | None = None
    replayed: RecordedRouting | None = None
    left_out_LE: jax.Array | None = None
    task_ids_BS: jax.Array | None = None

    @classmethod
    def of_batch(
        cls,
        batch: Batch,
        sequence_ids_B: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> ModelInputs:
        """Inputs from a batch of packed sequences, with its recorded routing if any.

        Args:
          batch: of the input pipeline.
          sequence_ids_B, rng: see the attributes.
        """
        replayed = None
        if "replayed_ids_BLSK" in batch:
            arrays = (batch[f"replayed_{name}_BLSK"] for name in RecordedRouting._fields)
            replayed = RecordedRouting(*map(jnp.asarray, arrays))
        task_ids_BS = jnp.asarray(batch["task_ids_BS"]) if "task_ids_BS" in batch else None
        return cls(
            jnp.asarray(batch["tokens_BS"]),
            jnp.asarray(batch["segment_ids_BS"]),
            jnp.asarray(batch["positions_BS"]),
            sequence_ids_B,
            rng,
            replayed,
            task_ids_BS=task_ids_BS,
        )

    def of_task(self, task_id: jax.Array | int | None) -> ModelInputs:
        """The same inputs, all of one task; None: as they are."""
        if task_id is None:
            return self
        return self._replace(task_ids_BS=jnp.full_like(self.tokens_BS, task_id))

    def assert_shapes(self, n_moe_layers: int) -> None:
        """Asserts that the parts belong to one batch; free at run time, shapes are static.

        Args:
          n_moe_layers: layers for which recorded routing must be there.
        """
        chex.assert_rank(self.tokens_BS, 2)
        b, s = self.tokens_BS.shape
        for x_BS in (self.segment_ids_BS, self.positions_BS, self.task_ids_BS):
            if x_BS is not None:
                chex.assert_shape(x_BS, (b, s))
        if self.sequence_ids_B is not None:
            chex.assert_shape(self.sequence_ids_B, (b,))
        if self.replayed is not None:
            chex.assert_shape([*self.replayed], (b, n_moe_layers, s, None))
            chex.assert_equal_shape([*self.replayed])
        if self.left_out_LE is not None:
            chex.assert_shape(self.left_out_LE, (n_moe_layers, None))


class RunCache(NamedTuple):
    """Caches of a run of layers (`layout.Run`), every array with a leading layer axis.

    Attributes:
      layers: of its MoE layers.
      between: of its dense layers; None without.
    """

    layers: Any
    between: Any


class Cache(NamedTuple):
    """Caches of all attention layers, filled with the positions so far.

    Attributes:
      leading: of each leading dense layer, in the form of its attention.
      stacked: of the MoE layers of the first run (`layout.runs`), every array with a leading layer
        axis.
      length: int32, positions filled so far, the same for every sequence.
      segment_ids_BL: int32, 1 where a token of the sequence is, 0 where padding is, or nothing yet.
        So sequences may differ in length: a shorter one has padding, before or between its tokens.
      between: of its dense layers, as `stacked`; None without.
      further: of the other runs.
    """

    leading: tuple[Any, ...]
    stacked: Any
    length: jax.Array
    segment_ids_BL: jax.Array
    between: Any = None
    further: tuple[RunCache, ...] = ()

    @classmethod
    def of(
        cls,
        leading: tuple[Any, ...],
        of_runs: Sequence[RunCache],
        length: jax.Array,
        segment_ids_BL: jax.Array,
    ) -> Cache:
        """A cache from those of the leading layers and of the runs."""
        (stacked, between), *further = of_runs
        return cls(leading, stacked, length, segment_ids_BL, between, tuple(further))

    @property
    def of_runs(self) -> list[RunCache]:
        """The caches of all runs, in order."""
        return [RunCache(self.stacked, self.between), *self.further]

    @property
    def max_length(self) -> int:
        """Positions that the cache can hold."""
        return self.segment_ids_BL.shape[1]


class Output(NamedTuple):
    """Results of a forward pass.

    Attributes:
      logits_BSV: float32.
      report: of the MoE layers, every array with a leading layer axis; None without routed experts.
      cache: updated, if one was given.
    """

    logits_BSV: jax.Array
    report: LayerReport | None
    cache: Cache | None


class Scored(NamedTuple):
    """Results of a forward pass over text whose next tokens are known.

    Attributes:
      nll_BS: negative log-likelihood of every target in nats, float32.
      logits_BSV: float32; None where they were computed in blocks and never whole.
      report: as in `Output`; with `ahead`, those of its modules come last.
      ahead: predictions of tokens further ahead, if they were asked for.
      best_BS: int32, the token of the largest logit, if it was asked for.
      hidden_BSD: what the head gets, normed, if it was asked for.
    """

    nll_BS: jax.Array
    logits_BSV: jax.Array | None
    report: LayerReport | None
    ahead: Ahead | None = None
    best_BS: jax.Array | None = None
    hidden_BSD: jax.Array | None = None
