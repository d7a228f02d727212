"""One optimizer step as a pure function of state and batch, and how it is split over a mesh.

Shapes: B sequences of the global batch, S positions, V vocabulary, L MoE layers, K columns of a
routing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol, cast

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsmoe_jax.config import Config, ModelConfig
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.evaluation.cross_entropy import AheadSums
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.model.build import ModelState
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.report import LoggedSums
from dsmoe_jax.moe.schedules import Progress, multiple
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.parallel import sharding
from dsmoe_jax.training import router_state, spikes
from dsmoe_jax.training.distillation import Distilled
from dsmoe_jax.training.freezing import Freezing
from dsmoe_jax.training.micro_batches import BatchGradient
from dsmoe_jax.training.optimizer import make_schedule, optimizer_of
from dsmoe_jax.training.spikes import Judged
from dsmoe_jax.training.start import TrainState, state_shapes

# Without this a TPU computes nothing while tokens travel to their experts.
_COMPILER_OPTIONS = {"tpu": {"xla_tpu_enable_async_ragged_all_to_all": True}}


class StepMetrics(NamedTuple):
    """Measurements of a step, still on the device.

    Attributes:
      loss: cross-entropy in nats per predicted token.
      total_loss: sum of all parts: what is differentiated.
      parts: of the loss by name, with their weights, see `objective.LOSS_PARTS`.
      tokens: predicted tokens of the global batch.
      bytes: UTF-8 bytes that those tokens stand for.
      grad_norm: global norm before clipping, of the parameters that are trained.
      learning_rate: of this update.
      terms: value of each balance term that has a weight, here without it, (L,).
      router: sums of the MoE layers, with a leading layer axis, over the global batch; None without
        routed experts.
      recorded: routing of the global batch, (L, B, S, K), if the run records it.
      ahead: sums of multi-token prediction, by module; None without it.
      distilled: sums of the differences from a teacher; None without one.
      judged: whether the step is a spike; None without `train.spikes`.
      biases: routers whose balance bias moved, and had to; None without, or where it is frozen.
    """

    loss: jax.Array
    total_loss: jax.Array
    parts: dict[str, jax.Array]
    tokens: jax.Array
    bytes: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    terms: dict[str, jax.Array]
    router: LoggedSums | None
    recorded: RecordedRouting | None
    ahead: AheadSums | None = None
    distilled: Distilled | None = None
    judged: Judged | None = None
    biases: router_state.Biases | None = None


class TrainStep(Protocol):
    """A step: from the state before it, its batch and the arrays of the run's teacher, if any."""

    def __call__(
        self, state: TrainState, batch: Batch, teacher: ModelState | None = None
    ) -> tuple[TrainState, StepMetrics]: ...


def make_train_step(
    config: Config, bytes_V: Any, teacher_model: ModelConfig | None = None
) -> TrainStep:
    """Builds the pure `(state, batch) -> (state, metrics)`; `jit_train_step` compiles it.

    Args:
      config: of the run.
      bytes_V: UTF-8 bytes of each token, for bits per byte.
      teacher_model: of the run's teacher; None without one.
    """
    assert not config.optimizer.rate_changes, "each stage has a peak of its own, see stages_of"
    gradient = BatchGradient(config, bytes_V, teacher_model)
    steps = config.train.scheduled_steps
    optimizer = optimizer_of(config)
    freezing = Freezing(config)
    schedule = make_schedule(config.optimizer, steps)
    rule = config.train.spikes

    def train_step(
        state: TrainState, batch: Batch, teacher: ModelState | None = None
    ) -> tuple[TrainState, StepMetrics]:
        assert_shapes(batch)
        rng = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        progress = Progress(state.step, steps)
        weights = losses.weights_at(config.model.moe.balance, progress)
        trained, frozen = freezing.split(state.params)
        others = nnx.merge_state(frozen, state.other)
        of_mtp = mtp_weight(config, progress)
        totals, grads, recorded = gradient(trained, others, batch, rng, weights, of_mtp, teacher)
        with jax.named_scope("optimizer"):
            grads = freezing.gradient(grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, trained)
            after = freezing.updated(
                cast(nnx.State, optax.apply_updates(trained, updates)), trained
            )
            params = nnx.merge_state(after, frozen)
            grad_norm = optax.tree.norm(grads)
        sums = totals.sums
        metrics = StepMetrics(
            loss=sums.nll / sums.tokens,
            total_loss=totals.total_loss,
            parts=totals.parts,
            tokens=sums.tokens,
            bytes=sums.bytes,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            terms=totals.terms,
            router=totals.router,
            recorded=recorded,
            ahead=totals.ahead,
            distilled=totals.distilled,
        )
        other = state.other
        if totals.router is not None and freezing.moves_router:
            load_LE = totals.router.load_of_choices
            other = router_state.after_step(other, load_LE, progress, config.model)
            biases = router_state.count_moved(state.other, other, load_LE, progress, config.model)
            metrics = metrics._replace(biases=biases)
        after = TrainState(state.step + 1, params, opt_state, other)
        if rule is None:
            return after, metrics
        assert state.spikes is not None
        judged, window = spikes.judge(rule, state.spikes, state.step, metrics.loss, grad_norm)
        if spikes.ACTIONS[rule.action].skips:
            kept = (state.params, state.opt_state, state.other)
            moved = (params, opt_state, other)
            after = TrainState(after.step, *spikes.unless(judged.is_spike, kept, moved))
        return after._replace(spikes=window), metrics._replace(judged=judged)

    return train_step


def mtp_weight(config: Config, progress: Progress) -> jax.Array | None:
    """The weight of multi-token prediction at a step; None without it."""
    section = config.model.mtp
    return None if section is None else section.factor * multiple(section.schedule, progress)


def assert_shapes(batch: Batch) -> None:
    """Asserts that the arrays of a batch are of the same sequences and positions."""
    tokens_BS = batch["tokens_BS"]
    chex.assert_rank(tokens_BS, 2)
    chex.assert_equal_shape([x for name, x in batch.items() if name.endswith("_BS")])
    replayed = [x for name, x in batch.items() if name.endswith("_BLSK")]
    if replayed:
        b, s = tokens_BS.shape
        chex.assert_shape(replayed, (b, None, s, None))
        chex.assert_equal_shape(replayed)


def jit_train_step(
    config: Config, bytes_V: Any, teacher_model: ModelConfig | None = None
) -> TrainStep:
    """`make_train_step` jitted for the ambient mesh, with the state donated.

    The state keeps its shardings, every device gets the metrics.  The batch is global: its rows
    split over the mesh, as `sharding.global_batch` makes them.  It is traced once: see
    `traced_once`.
    """
    train_step = traced_once(make_train_step(config, bytes_V, teacher_model))
    state = sharding.shardings(state_shapes(config))
    out_shardings = None if state is None else (state, sharding.whole())
    options = _COMPILER_OPTIONS.get(platform())
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=out_shardings, compiler_options=options
    )


def traced_once(train_step: TrainStep) -> TrainStep:
    """Refuses to trace a step a second time: every step would wait for a compilation.

    (`chex.assert_max_traces` counts by source line, so that the stages of a run would share one
    count.)

    Raises:
      AssertionError: on the second trace, naming the argument that has changed.
    """
    traced: list[Any] = []

    @functools.wraps(train_step)
    def guarded(
        state: TrainState, batch: Batch, teacher: ModelState | None = None
    ) -> tuple[TrainState, StepMetrics]:
        arguments = {"state": state, "batch": batch, "teacher": teacher}
        traced.append(jax.tree.map(jax.typeof, arguments))
        changed = _changed(traced[0], traced[-1])
        assert len(traced) == 1, f"the training step is traced again: {changed}"
        return train_step(state, batch, teacher)

    return guarded


def _changed(before: Any, now: Any) -> str:
    """The first array whose shape or type is another one."""
    old = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(before)}
    new = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(now)}
    for path in {**old, **new}:
        if old.get(path) != new.get(path):
            return f"{path} was {old.get(path)}, is {new.get(path)}"
    return "its arguments are of the same shapes"
