"""One optimizer step as a pure function of state and batch, and how it is split over a mesh.

Shapes: B sequences of the global batch, S positions, V vocabulary, L MoE layers, E routed experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dsmoe_jax.config import Config
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.model import build
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import dropping, losses
from dsmoe_jax.moe.report import LoggedSums
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.moe.routers.policy import policy_loss
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.parallel import sharding
from dsmoe_jax.training import micro_batches, router_state
from dsmoe_jax.training.optimizer import make_optimizer, make_schedule

# Without this a TPU computes nothing while tokens travel to their experts.
_COMPILER_OPTIONS = {"tpu": {"xla_tpu_enable_async_ragged_all_to_all": True}}


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32, updates made so far.
      params: the model's `nnx.Param`s, float32.
      opt_state: of the optax optimizer.
      other: the model's variables that carry no gradient: the routers' loss-free bias.
    """

    step: jax.Array
    params: nnx.State
    opt_state: Any
    other: nnx.State


class StepMetrics(NamedTuple):
    """What a step reports, still on the device.

    Attributes:
      loss: cross-entropy in nats per predicted token.
      total_loss: with the weighted balance terms: what is differentiated.
      tokens: predicted tokens of the global batch.
      bytes: UTF-8 bytes that those tokens stand for.
      grad_norm: global norm before clipping.
      learning_rate: of this update.
      terms: value of each balance term that has a weight, here without it, (L,).
      router: RouterStats with a leading layer axis, over the global batch; None without routed
        experts.
    """

    loss: jax.Array
    total_loss: jax.Array
    tokens: jax.Array
    bytes: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    terms: dict[str, jax.Array]
    router: LoggedSums | None
    recorded: RecordedRouting | None = None


class Sums(NamedTuple):
    """Sums over predicted tokens: their negative log-likelihood, number, and bytes."""

    nll: jax.Array
    tokens: jax.Array
    bytes: jax.Array


def build_model(config: Config, key: jax.Array | None = None) -> Transformer:
    """The model with freshly drawn parameters; call it under `jax.jit` or `nnx.eval_shape`.

    Args:
      config: of the run.
      key: a random key; None is the key of the config's seed.

    Raises:
      ValueError: for a model that cannot be, or experts without room for the tokens of a step.
    """
    train = config.train
    dropping.check_capacity(config.model.moe, config.tokens_per_step // train.accumulation_steps)
    key = jax.random.key(config.train.seed) if key is None else key
    return build.build_model(config.model, key)


def _first_state(config: Config, key: jax.Array, table_V: Any = None) -> TrainState:
    _, params, other = nnx.split(build_model(config, key), nnx.Param, ...)
    if table_V:
        other = router_state.fill(other, table_V)
    opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
    return TrainState(jnp.int32(0), params, opt_state, other)


def init_state(config: Config, token_counts: Callable[[], np.ndarray] | None = None) -> TrainState:
    """The state before the first step: parameters and moments made in one compiled call.

    On a mesh every array is made in its shards: no device ever has the whole.

    Args:
      config: of the run.
      token_counts: how often each token is in the training text; called by a config whose hash
        table needs it.

    Raises:
      ValueError: if it needs it and there is none.
    """
    table_V = router_state.first_values(config.model, token_counts)
    out_shardings = sharding.shardings(state_shapes(config))
    init = jax.jit(functools.partial(_first_state, config), out_shardings=out_shardings)
    return init(jax.random.key(config.train.seed), table_V)  # one program for all seeds and tables


def state_shapes(config: Config) -> TrainState:
    """The shapes of `init_state`, without devices."""
    # The key is made in here: nothing may run, the ambient mesh's devices may not exist.
    return jax.eval_shape(lambda: _first_state(config, jax.random.key(config.train.seed)))


def abstract_state(config: Config) -> TrainState:
    """The shapes of `init_state` with their shardings, as a target to load a checkpoint into.

    They are those of the ambient mesh; without one, the default device.
    """
    shapes = state_shapes(config)
    shardings = sharding.shardings(shapes)
    if shardings is None:
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: default, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def abstract_model(config: Config) -> nnx.GraphDef:
    """The model's structure without its arrays, to merge a state into."""
    return nnx.split(nnx.eval_shape(lambda: build_model(config)), nnx.Param, ...)[0]


def token_sums(logits_BSV: jax.Array, batch: Batch, bytes_V: Any) -> tuple[jax.Array, Sums]:
    """Negative log-likelihood of every target (B x S, 0 where masked) and the sums of a batch."""
    mask_BS = batch["loss_mask_BS"].astype(jnp.float32)
    nll_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, batch["targets_BS"])
    nll_BS = nll_BS * mask_BS
    bytes_V = jnp.asarray(bytes_V)  # in here: a traced function may not close over global arrays
    n_bytes = (bytes_V[batch["targets_BS"]].astype(jnp.float32) * mask_BS).sum()
    return nll_BS, Sums(nll_BS.sum(), mask_BS.sum(), n_bytes)


class Parts(NamedTuple):
    """What a micro-batch contributes; all of it adds up over the micro-batches.

    Attributes:
      total_loss: what is differentiated.
      sums, terms, router: see `StepMetrics`.
    """

    total_loss: jax.Array
    sums: Sums
    terms: dict[str, jax.Array]
    router: LoggedSums | None
    recorded: RecordedRouting | None = None


def make_gradients(config: Config, bytes_V: Any) -> Callable[..., tuple[Parts, nnx.State]]:
    """Builds `(params, other, batch, rng, weights) -> (Parts, gradients)` of a global batch.

    Accumulation changes no number: every part of the loss knows the counts of the whole batch.
    Balance terms of scope `global_batch` need the load of all micro-batches before the gradient of
    the first one: it is counted in a forward pass of its own, which costs what a forward pass
    costs, and only then.

    Args:
      config: of the run.
      bytes_V: UTF-8 bytes of each token.
    """
    graph, n_micro, moe = (
        abstract_model(config),
        config.train.accumulation_steps,
        config.model.moe,
    )

    def forward(params, other, micro: Batch, sequence_B, rng):
        model = nnx.merge(graph, params, other)
        return model.forward(ModelInputs.of_batch(micro, sequence_B, rng))

    def loss_fn(params, other, micro: Batch, sequence_B, rng, weights, all_tokens, whole):
        output = forward(params, other, micro, sequence_B, rng)
        nll_BS, sums = token_sums(output.logits_BSV, micro, bytes_V)
        loss, terms, router, choice = sums.nll / all_tokens, {}, output.report, None
        if router is not None:
            terms = {
                name: losses.value(name, part, whole)
                for name, part in router.loss_inputs.terms.items()
            }
            loss += sum(weights[name] * terms[name].sum() for name in weights)
            if (drawn_LBS := router.loss_inputs.policy) is not None:
                bonus, mask_BS = (
                    get_router(moe)[1].option("entropy_factor"),
                    jnp.asarray(micro["loss_mask_BS"]),
                )
                loss += policy_loss(drawn_LBS, nll_BS, mask_BS, bonus) / all_tokens
            choice = router.recorded if config.train.record_routing else None
            router = router.logged
        return loss, (Parts(loss, sums, terms, router), choice)

    def sent(params, other, micro: Batch, sequence_B, rng):
        router = forward(params, other, micro, sequence_B, rng).report
        assert router is not None
        return {
            name: router.loss_inputs.terms[name].sent_G
            for name in losses.counted_over_batch(moe.balance)
        }

    def gradients(params, other, batch: Batch, rng, weights):
        micros, sent_LG = micro_batches.split(batch, n_micro), None
        if n_micro > 1 and losses.counted_over_batch(moe.balance):
            sent_LG, _ = micro_batches.add_up(
                lambda micro: (sent(params, other, *micro, rng=rng), None), micros
            )
        all_tokens = batch["loss_mask_BS"].astype(jnp.float32).sum()
        whole = losses.whole_batch(jnp.asarray(batch["segment_ids_BS"] > 0), sent_LG)

        def part_of(micro):
            grad_fn = jax.grad(loss_fn, has_aux=True)
            grads, (parts, choice) = grad_fn(params, other, *micro, rng, weights, all_tokens, whole)
            return (parts, grads), choice

        (parts, grads), choice = micro_batches.add_up(part_of, micros)
        if choice is not None:
            parts = parts._replace(recorded=micro_batches.join(choice))
        return parts, grads

    return gradients


def make_train_step(
    config: Config, bytes_V: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Builds the pure `(state, batch) -> (state, metrics)`; `jit_train_step` compiles it.

    Args:
      config: of the run.
      bytes_V: UTF-8 bytes of each token, for bits per byte.
    """
    gradients, steps = make_gradients(config, bytes_V), config.train.steps
    optimizer = make_optimizer(config.optimizer, steps)
    schedule = make_schedule(config.optimizer, steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        weights = losses.weights_at(config.model.moe.balance, state.step / steps)
        parts, grads = gradients(state.params, state.other, batch, rng, weights)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(nnx.State, optax.apply_updates(state.params, updates))
        sums, other = parts.sums, state.other
        metrics = StepMetrics(
            loss=sums.nll / sums.tokens,
            total_loss=parts.total_loss,
            tokens=sums.tokens,
            bytes=sums.bytes,
            grad_norm=optax.tree.norm(grads),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            terms=parts.terms,
            router=parts.router,
            recorded=parts.recorded,
        )
        if parts.router is not None:
            other = router_state.after_step(other, parts.router.load_E, config.model)
        return TrainState(state.step + 1, params, opt_state, other), metrics

    return train_step


def jit_train_step(
    config: Config, bytes_V: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """`make_train_step` jitted for the ambient mesh, with the state donated.

    The state keeps its shardings, every device gets the metrics.  The batch is global: its rows
    split over the mesh, as `sharding.global_batch` makes them.
    """
    train_step = make_train_step(config, bytes_V)
    state = sharding.shardings(state_shapes(config))
    out_shardings = None if state is None else (state, sharding.whole())
    options = _COMPILER_OPTIONS.get(platform())
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=out_shardings, compiler_options=options
    )
