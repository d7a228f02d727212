"""One optimizer step as a pure function of state and batch, and how it is split over a mesh.

Shapes: B sequences of the global batch, S positions, V vocabulary, L MoE layers, E routed experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsmoe_jax.config import Config
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.layer import RouterBias, RouterStats
from dsmoe_jax.nn.transformer import Transformer
from dsmoe_jax.parallel import sharding
from dsmoe_jax.training.optimizer import make_optimizer, make_schedule


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
      router: RouterStats with a leading layer axis, over the global batch; None without routed
        experts.
    """

    loss: jax.Array
    total_loss: jax.Array
    tokens: jax.Array
    bytes: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    router: RouterStats | None


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
    """
    key = jax.random.key(config.train.seed) if key is None else key
    return Transformer(config.model, rngs=nnx.Rngs(key))


def _first_state(config: Config, key: jax.Array) -> TrainState:
    _, params, other = nnx.split(build_model(config, key), nnx.Param, ...)
    opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
    return TrainState(jnp.int32(0), params, opt_state, other)


def init_state(config: Config) -> TrainState:
    """The state before the first step: parameters and moments made in one compiled call.

    On a mesh every array is made in its shards: no device ever has the whole.
    """
    out_shardings = sharding.shardings(state_shapes(config))
    init = jax.jit(functools.partial(_first_state, config), out_shardings=out_shardings)
    return init(jax.random.key(config.train.seed))  # an argument: all seeds share one program


def state_shapes(config: Config) -> TrainState:
    """The shapes of `init_state`, without devices."""
    key = jax.random.key(config.train.seed)
    return jax.eval_shape(functools.partial(_first_state, config), key)


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


def make_train_step(
    config: Config, bytes_V: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Builds the pure `(state, batch) -> (state, metrics)`; `jit_train_step` compiles it.

    Args:
      config: of the run.
      bytes_V: UTF-8 bytes of each token, for bits per byte.
    """
    graph = abstract_model(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = make_schedule(config.optimizer, config.train.steps)
    weights = losses.active_terms(config.model.moe)
    n_micro = config.train.accumulation_steps

    def loss_fn(params, other, batch: Batch, all_tokens, rng):
        """A micro-batch's part of the loss: the parts of all micro-batches add up to it."""
        model = nnx.merge(graph, params, other)
        output = model.forward(
            batch["tokens_BS"], batch["segment_ids_BS"], batch["positions_BS"], rng=rng
        )
        _, sums = token_sums(output.logits_BSV, batch, bytes_V)
        loss = sums.nll / all_tokens
        if output.router_stats is not None:
            terms = output.router_stats.terms  # each of shape (L,)
            # Means over sequences, of which every micro-batch has the same number.
            loss += sum(weights[name] * terms[name].sum() for name in terms) / n_micro
        return loss, (sums, output.router_stats)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        all_tokens = batch["loss_mask_BS"].astype(jnp.float32).sum()
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def micro_step(micro: Batch, rng):
            (loss, (sums, router)), grads = grad_fn(
                state.params, state.other, micro, all_tokens, rng
            )
            return (loss, sums, router), grads

        rng = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        if n_micro == 1:
            (total, sums, router), grads = micro_step(batch, rng)
        else:
            (total, sums, router), grads = _accumulate(micro_step, batch, rng, n_micro)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(nnx.State, optax.apply_updates(state.params, updates))
        metrics = StepMetrics(
            loss=sums.nll / sums.tokens,
            total_loss=total,
            tokens=sums.tokens,
            bytes=sums.bytes,
            grad_norm=optax.tree.norm(grads),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            router=router,
        )
        other = state.other
        if router is not None and (speed := config.model.moe.bias_update_speed):
            other = move_bias(other, router.load_E, speed)
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
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def move_bias(other: nnx.State, load_LE: jax.Array, speed: float) -> nnx.State:
    """Loss-free balancing: `b_i += speed * sign(mean load - load_i)` (2408.15664 algorithm 1).

    Args:
      other: with one `RouterBias` of shape (L, E), that of the stacked MoE layers.
      load_LE: assignments of the whole global batch.
      speed: gamma.
    """
    bias, rest = nnx.split_state(other, RouterBias, ...)
    below_LE = jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    return nnx.merge_state(jax.tree.map(lambda b_LE: b_LE + speed * below_LE, bias), rest)


def _accumulate(micro_step, batch: Batch, rng, n_micro: int):
    """Scans over micro-batches, adding up gradients and sums; router statistics are merged."""

    def cut(x_B: jax.Array) -> jax.Array:
        # Every n-th row, not a block of them: then no row leaves its device.
        micros = x_B.reshape(-1, n_micro, *x_B.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(micros, "LB" + "S" * (x_B.ndim - 1))

    micros = jax.tree.map(cut, batch)
    micros = micros, jax.random.split(rng, n_micro)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(micro_step, *jax.tree.map(lambda x: x[0], micros)),
    )

    def body(total, micro):
        return jax.tree.map(jnp.add, total, micro_step(*micro)), None

    ((loss, sums, router), grads), _ = jax.lax.scan(body, zeros, micros)
    if router is not None:  # loads and ledgers add up; entropy and terms are means
        mean = lambda tree: jax.tree.map(lambda x: x / n_micro, tree)  # noqa: E731
        router = router._replace(entropy=mean(router.entropy), terms=mean(router.terms))
    return (loss, sums, router), grads
