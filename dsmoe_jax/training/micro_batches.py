"""The gradient of a global batch, computed in micro-batches one after the other.

Accumulation changes no number: every part of the loss knows the counts of the whole batch.  On a
mesh with stages several micro-batches go through the pipeline together (model/pipelined.py), which
adds them up: here they are then one.

Shapes: B sequences of the global batch, b of a micro-batch, n micro-batches, S positions, L MoE
layers, G groups of a balance term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import Config, ModelConfig
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.evaluation.cross_entropy import AheadSums, Sums, ahead_sums, token_sums
from dsmoe_jax.model import mtp, pipelined
from dsmoe_jax.model.build import ModelState, abstract_model
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs, Scored
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.report import LoggedSums
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.parallel import sharding
from dsmoe_jax.training import distillation
from dsmoe_jax.training.distillation import Distilled
from dsmoe_jax.training.objective import (
    LossContext,
    balance_terms,
    needs_logits,
    training_loss,
)


class MicroBatch(NamedTuple):
    """Some sequences of the global batch, and their places in it.

    Noise and protection go by these places: they are the same in any number of micro-batches.
    """

    batch: Batch
    sequence_ids_B: jax.Array


class Totals(NamedTuple):
    """Results of a micro-batch besides its gradient; those of all micro-batches add up.

    Attributes:
      total_loss: what is differentiated.
      parts: of the loss, by name.
      sums: over predicted tokens.
      terms: of the balance, without their weights, (L,).
      router: sums of the MoE layers, for the log; None without routed experts.
      ahead: sums of multi-token prediction; None without it.
      distilled: sums of the differences from a teacher; None without one.
    """

    total_loss: jax.Array
    parts: dict[str, jax.Array]
    sums: Sums
    terms: dict[str, jax.Array]
    router: LoggedSums | None
    ahead: AheadSums | None = None
    distilled: Distilled | None = None


class Gradients(NamedTuple):
    """Results of a global batch.

    Attributes:
      totals: of all micro-batches.
      params: the gradient of the total loss with respect to the parameters.
      recorded: routing of the batch, (L, B, S, K), if the run records it.
    """

    totals: Totals
    params: nnx.State
    recorded: RecordedRouting | None


class BatchGradient:
    """The gradient of a global batch: `(params, other, batch, rng, weights) -> Gradients`.

    Args:
      config: of the run.
      bytes_V: UTF-8 bytes of each token.
      teacher: the model of the run's teacher; None without one.
    """

    def __init__(self, config: Config, bytes_V: Any, teacher: ModelConfig | None = None):
        self._config = config
        self._bytes_V = bytes_V
        self._graph = abstract_model(config.model)
        self._teacher_graph = None if teacher is None else abstract_model(teacher)
        self._n_micro = config.train.accumulation_steps
        self._counted = losses.counted_over_batch(config.model.moe.balance)

    def __call__(
        self,
        params: nnx.State,
        other: nnx.State,
        batch: Batch,
        rng: jax.Array,
        weights: dict[str, jax.Array],
        mtp_weight: jax.Array | None = None,
        teacher: ModelState | None = None,
    ) -> Gradients:
        """Computes the gradient; call it under `jax.jit`.

        Args:
          params: to differentiate with respect to.
          other: all other arrays of the model, frozen parameters among them.
          batch: the global batch.
          rng: random key of the step.
          weights: of the balance terms.
          mtp_weight: of multi-token prediction; None without it.
          teacher: the arrays of the run's teacher; None without one.
        """
        micros = split(batch, self._n_micro)
        schedule = pipelined.schedule_of(self._config)
        if schedule is not None:  # those that pass through the stages together add up there
            micros = jax.tree.map(lambda x_n: _together(x_n, schedule.micro_batches), micros)
        sent_LG = self._load_of_batch(params, other, micros, rng)
        all_tokens = batch["loss_mask_BS"].astype(jnp.float32).sum()
        whole = self._whole(jnp.asarray(batch["segment_ids_BS"]), sent_LG)

        def part_of(micro: MicroBatch):
            micro = _laid_out(micro)
            grad_fn = jax.grad(self._loss, has_aux=True)
            grads, (totals, recorded) = grad_fn(
                params, other, micro, rng, weights, mtp_weight, all_tokens, whole, teacher
            )
            return (totals, grads), recorded

        (totals, grads), recorded = add_up(part_of, micros)
        if recorded is not None and schedule is not None:
            recorded = jax.tree.map(lambda x: _apart(x, schedule.micro_batches), recorded)
        return Gradients(totals, grads, None if recorded is None else join(recorded))

    def _score(self, model: Transformer, micro: MicroBatch, rng) -> Scored:
        inputs = ModelInputs.of_batch(micro.batch, micro.sequence_ids_B, rng)
        targets_BS = jnp.asarray(micro.batch["targets_BS"])
        return model.score(
            inputs,
            targets_BS,
            whole_logits=needs_logits(self._config),
            look_ahead=self._config.model.mtp is not None,
            with_hidden=self._config.train.distillation is not None,
            schedule=pipelined.schedule_of(self._config),
        )

    def _whole(self, segment_ids_BS: jax.Array, sent_LG: dict[str, jax.Array] | None):
        """Counts over the global batch; by layer where modules see fewer tokens than layers do."""
        model = self._config.model
        if not model.mtp_depth:
            return losses.whole_batch(segment_ids_BS, sent_LG)
        n = len(model.moe_layers)
        of_layers = jnp.broadcast_to(segment_ids_BS, (n, *segment_ids_BS.shape))
        of_modules = mtp.segment_ids(segment_ids_BS, model.mtp_depth)
        counts = jax.vmap(losses.whole_batch)(jnp.concatenate([of_layers, of_modules]))
        return counts._replace(sent_LG=sent_LG)

    def _loss(
        self, params, other, micro: MicroBatch, rng, weights, mtp_weight, all_tokens, whole, teacher
    ):
        """Share of a micro-batch in the training loss; its `Totals` and recorded routing."""
        model = nnx.merge(self._graph, params, other)
        output = self._score(model, micro, rng)
        distilled = self._distilled(model, output, teacher, micro)
        with jax.named_scope("head"):
            nll_BS, sums = token_sums(output.nll_BS, micro.batch, self._bytes_V)
            ahead = None if output.ahead is None else ahead_sums(output.ahead, micro.batch)
        with jax.named_scope("router"):
            terms = balance_terms(output, whole)
        loss, parts = training_loss(
            LossContext(
                self._config,
                micro.batch,
                output,
                nll_BS,
                sums,
                terms,
                weights,
                all_tokens,
                ahead,
                mtp_weight,
                distilled,
            )
        )
        report = output.report
        if report is None:
            return loss, (Totals(loss, parts, sums, terms, None, ahead, distilled), None)
        recorded = report.recorded if self._config.train.record_routing else None
        totals = Totals(loss, parts, sums, terms, report.logged, ahead, distilled)
        return loss, (totals, recorded)

    def _distilled(
        self, model: Transformer, output: Scored, teacher: ModelState | None, micro: MicroBatch
    ) -> Distilled | None:
        """Differences from the teacher; None without one."""
        section = self._config.train.distillation
        if section is None:
            return None
        assert self._teacher_graph is not None
        assert teacher is not None, "a run with a teacher gets its arrays in every step"
        frozen = nnx.merge(self._teacher_graph, *teacher)
        return distillation.compare(section, model, output, frozen, micro.batch)

    def _load_of_batch(self, params, other, micros: MicroBatch, rng) -> dict[str, jax.Array] | None:
        """The load of all micro-batches together on each group, by balance term.

        Terms of scope `global_batch` need it before the gradient of the first micro-batch: it is
        counted in a forward pass of its own, which costs what a forward pass costs, and only then.
        """
        if len(micros.sequence_ids_B) == 1 or not self._counted:
            return None

        def sent(micro: MicroBatch):
            micro = _laid_out(micro)
            report = self._score(nnx.merge(self._graph, params, other), micro, rng).report
            assert report is not None
            return {name: report.loss_inputs.terms[name].sent_G for name in self._counted}, None

        return add_up(sent, micros)[0]


def split(batch: Batch, n_micro: int) -> MicroBatch:
    """The micro-batches along a new leading axis."""
    n_sequences = len(batch["tokens_BS"])
    chex.assert_is_divisible(n_sequences, n_micro)
    whole = MicroBatch(batch, jnp.arange(n_sequences))
    if n_micro == 1:
        return jax.tree.map(lambda x: x[None], whole)

    def cut(x_B: jax.Array) -> jax.Array:
        # Every n-th row, not a block of them: then no row leaves its device.
        micros = x_B.reshape(-1, n_micro, *x_B.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(micros, "UB" + "S" * (x_B.ndim - 1))

    return jax.tree.map(cut, whole)


def _together(x_n: jax.Array, passing: int) -> jax.Array:
    """Micro-batches as the pipeline takes them: (n, b, ...) -> (n / passing, passing b, ...)."""
    return pipelined.whole(x_n.reshape(-1, passing, *x_n.shape[1:]), axis=1)


def _laid_out(micro: MicroBatch) -> MicroBatch:
    """A micro-batch whose rows are split over the mesh.

    On its way into the loop over fillings of a pipeline XLA loses that: every device would look up
    the embeddings of almost all rows, 144 GiB of them and their gradients for 145B.
    """
    return jax.tree.map(lambda x_B: sharding.constrain(x_B, "B" + "S" * (x_B.ndim - 1)), micro)


def _apart(x: jax.Array, passing: int) -> jax.Array:
    """The reverse of `_together`, of (n / passing, L, passing b, ...): (n, L, b, ...)."""
    x = jnp.moveaxis(pipelined.cut(x, passing, axis=2), 2, 1)
    return x.reshape(-1, *x.shape[2:])


def join(micros: Any) -> Any:
    """Puts the rows that `split` has cut apart back in order: (n, L, b, ...) -> (L, b n, ...)."""

    def whole(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])

    return jax.tree.map(whole, micros)


def add_up(part_of: Callable[[Any], tuple[Any, Any]], micros: Any) -> tuple[Any, Any]:
    """Calls `part_of` for one micro-batch after the other.

    Returns:
      The sum of its first results, and all second ones along a new leading axis.
    """
    first = jax.tree.map(lambda x: x[0], micros)
    if len(jax.tree.leaves(micros)[0]) == 1:
        total, each = part_of(first)
        return total, jax.tree.map(lambda x: x[None], each)
    shapes, _ = jax.eval_shape(part_of, first)

    def add(total, micro):
        part, each = part_of(micro)
        with jax.named_scope("add_up"):
            return jax.tree.map(jnp.add, total, part), each

    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), micros)
