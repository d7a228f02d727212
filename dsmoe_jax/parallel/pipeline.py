"""A pipeline over the mesh axis `stage`: every stage holds some of the layers, micro-batches pass.

The program is a `jax.lax.scan` over ticks.  In a tick every stage runs one group of layers on one
micro-batch and passes the activations to its neighbour by `ppermute`.  With `repeats` R > 1 a stage
holds R groups that do not follow each other, and a micro-batch goes round R times (the circular
schedule; interleaved stages, 2104.04473 section 2.2).  For S stages and n micro-batches there are
R n + S - 1 ticks, of which a stage idles in S - 1: the bubble is

    (S - 1) / (R n + S - 1)

of the time of the layers.

Reverse-mode differentiation of the scan runs the ticks backwards, so that a step is all forward
ticks and then all backward ones (GPipe, 1811.06965).

Manual and automatic axes.  `jax.shard_map` is manual over `stage` alone; all other axes stay
automatic inside, and the dispatch of the experts has its own `jax.shard_map` over those
(`sharding.on_shards`).  With jax 0.10.2 the two nest and transpose: values and gradients are those
of the plain loop (tests/parallel/test_pipeline_ticks.py).  Earlier versions could not transpose it.

Shapes: L groups of layers, S stages, R repeats, l = L / (S R) groups of a stage and repeat,
n micro-batches; `...` any other axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dsmoe_jax.parallel.sharding import constrain

AXIS = "stage"


class Schedule(NamedTuple):
    """The course of a batch through the stages.

    Attributes:
      micro_batches: n, into which the batch is cut.
      repeats: R, groups of layers of a stage.
    """

    micro_batches: int
    repeats: int = 1

    def ticks(self, stages: int) -> int:
        """Ticks of a forward pass."""
        return self.repeats * self.micro_batches + stages - 1

    def bubble(self, stages: int) -> float:
        """Share of the ticks in which a stage has nothing to do."""
        return (stages - 1) / self.ticks(stages)


class Tick(NamedTuple):
    """A stage's part in a tick.

    Attributes:
      active: bool; False in the bubble, whose results are thrown away.
      repeat: int32, the round of the micro-batch; 0 in the bubble before the first.
      micro_batch: int32.
    """

    active: jax.Array
    repeat: jax.Array
    micro_batch: jax.Array


# (x, inputs of the micro-batch, arrays of the l layers, what `pick` needs, inputs of the l layers)
#   -> (x, outputs with a leading axis l).
Body = Callable[[Any, Any, Any, Tick, Any], tuple[Any, Any]]


def stages() -> int:
    """S of the ambient mesh; 1 without one, and inside of a stage."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AXIS in mesh.manual_axes:
        return 1
    return mesh.shape.get(AXIS, 1)


def pick(params_R: Any, tick: Tick) -> Any:
    """The arrays of this tick's repeat.  Call it inside of `jax.checkpoint`.

    Outside, the backward pass would keep a copy of the arrays for every tick.
    """

    def one(x_R: jax.Array) -> jax.Array:
        if len(x_R) == 1:
            return x_R[0]
        return jax.lax.dynamic_index_in_dim(x_R, tick.repeat, keepdims=False)

    return jax.tree.map(one, params_R)


def run(
    body: Body,
    schedule: Schedule,
    x_n: jax.Array,
    micros_n: Any,
    params_L: Any,
    layers_L: Any,
    axes: str,
) -> tuple[jax.Array, Any]:
    """Runs all groups of layers on all micro-batches, on the ambient mesh.

    Args:
      body: runs l groups.  Its arrays have the axes (l, R, ...): see `pick`.
      schedule: R n micro-batches and rounds; with R > 1 there must be n >= S.
      x_n: activations, (n, ...).
      micros_n: other inputs of the micro-batches, (n, ...), which every stage gets whole.
      params_L: arrays of the layers, (L, ...), split over `stage`.
      layers_L: small inputs of the layers, (L, ...), which every stage gets whole.
      axes: the logical axes of a micro-batch's activations (parallel/sharding.py).

    Returns:
      The activations, (n, ...), and the outputs of all groups, (L, n, ...).  The bubble has no part
      in either.
    """
    n, repeats = schedule
    s = stages()
    n_layers = len(jax.tree.leaves(params_L)[0])
    assert n_layers % (s * repeats) == 0, "stages x repeats must divide the groups of layers"
    assert repeats == 1 or n >= s, "the first micro-batch would come round before the last began"
    # Slots: as many on every stage.
    x_n = jnp.pad(x_n, ((0, -n % s), *[(0, 0)] * (x_n.ndim - 1)))
    on_stage = jax.shard_map(
        functools.partial(_on_stage, body, schedule, s, axes),
        in_specs=(P(AXIS), P(), P(AXIS), P()),
        out_specs=(P(AXIS), P(None, AXIS)),
        axis_names={AXIS},
        check_vma=False,
    )
    y_n, outputs = on_stage(x_n, micros_n, params_L, layers_L)
    return y_n[:n], jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), outputs)


def _on_stage(
    body: Body,
    schedule: Schedule,
    s: int,
    axes: str,
    x_k: jax.Array,
    micros_n: Any,
    params: Any,
    layers: Any,
) -> tuple[jax.Array, Any]:
    """The work of one stage, which has k = n / S of the activations."""
    n, repeats = schedule
    stage = jax.lax.axis_index(AXIS)
    is_first = stage == 0
    params_lR = jax.tree.map(lambda a: jnp.moveaxis(by_repeat(a, s, repeats), 0, 1), params)
    n_groups = len(jax.tree.leaves(params_lR)[0])
    rounds = repeats * n

    def put(t: jax.Array | int) -> _Slot:
        """The slot of what has come from the last stage: it was begun S ticks ago."""
        return _Slot((t - s) % n, is_first & (t >= s))

    def take(t: jax.Array) -> _Slot:
        return _Slot(t % n, is_first & (t < rounds))

    def one_tick(carry: tuple[Any, Any], t: jax.Array) -> tuple[tuple[Any, Any], Any]:
        waiting_n, arrived = carry
        waiting_n, first = exchange(waiting_n, arrived, put(t), take(t))
        x = jnp.where(is_first, first, arrived)
        begun = t - stage
        at = jnp.clip(begun, 0, rounds - 1)
        tick = Tick((begun >= 0) & (begun < rounds), at // n, at % n)
        micro = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, tick.micro_batch, keepdims=False), micros_n
        )
        first_layer = (tick.repeat * s + stage) * n_groups
        of_group = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, first_layer, n_groups), layers
        )
        y, outputs = body(x, micro, params_lR, tick, of_group)
        ring = [(i, (i + 1) % s) for i in range(s)]
        arrived = constrain(jax.lax.ppermute(y, AXIS, ring), axes)
        return (constrain(waiting_n, f"U{axes}"), arrived), outputs

    ticks = schedule.ticks(s)
    start = (constrain(_to_first(x_k, s), f"U{axes}"), constrain(jnp.zeros_like(x_k[0]), axes))
    (waiting_n, arrived), outputs_t = jax.lax.scan(one_tick, start, jnp.arange(ticks))
    nothing = _Slot(jnp.int32(0), jnp.bool_(False))
    waiting_n, _ = exchange(waiting_n, arrived, put(ticks), nothing)

    def without_bubble(a_t: jax.Array) -> jax.Array:
        """(ticks, l, ...) -> (R, 1, l, n, ...): the ticks of this stage that were active."""
        a_t = jax.lax.dynamic_slice_in_dim(a_t, stage, rounds)
        return jnp.moveaxis(a_t.reshape(repeats, 1, n, *a_t.shape[1:]), 2, 3)

    return _from_first(waiting_n, s), jax.tree.map(without_bubble, outputs_t)


class _Slot(NamedTuple):
    """A place among the waiting micro-batches, and whether there is anything to put or take."""

    index: jax.Array | int
    valid: jax.Array


@jax.custom_vjp
def exchange(
    waiting_n: jax.Array, arrived: jax.Array, put: _Slot, take: _Slot
) -> tuple[jax.Array, jax.Array]:
    """Puts a micro-batch into its slot, and takes the next one; zeros if there is none.

    A slot is taken before it is put again, and put before it is taken again, so what has been taken
    is never read: the gradient is the same exchange with the two slots swapped, in place.  (That of
    a slice and an update would add whole buffers in every tick.)
    """
    old = jax.lax.dynamic_index_in_dim(waiting_n, put.index, keepdims=False)
    new = jnp.where(put.valid, arrived, old)
    waiting_n = jax.lax.dynamic_update_index_in_dim(waiting_n, new, put.index, 0)
    taken = jax.lax.dynamic_index_in_dim(waiting_n, take.index, keepdims=False)
    return waiting_n, jnp.where(take.valid, taken, 0)


def _exchange_fwd(waiting_n, arrived, put, take):
    return exchange(waiting_n, arrived, put, take), (put, take)


def _exchange_bwd(slots, gradients):
    put, take = slots
    return *exchange(*gradients, take, put), None, None


exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _to_first(x_k: jax.Array, s: int) -> jax.Array:
    """The activations of all stages, (n, ...), on the first one; zeros on the others."""
    # Not an all-to-all: XLA would gather what the automatic axes split.
    own = jnp.where(jax.lax.axis_index(AXIS) == 0, x_k, 0)
    come = [jax.lax.ppermute(x_k, AXIS, [(stage, 0)]) for stage in range(1, s)]
    return jnp.concatenate([own, *come])


def _from_first(x_n: jax.Array, s: int) -> jax.Array:
    """Its part of the first stage's activations for every stage, (k, ...)."""
    own, *others = jnp.split(x_n, s)
    found = jnp.where(jax.lax.axis_index(AXIS) == 0, own, 0)
    for stage, part in enumerate(others, start=1):
        found += jax.lax.ppermute(part, AXIS, [(0, stage)])  # zeros elsewhere
    return found


def by_repeat(a: jax.Array, s: int, repeats: int) -> jax.Array:
    """The groups that a stage runs, (R, l, ...), from those that it holds, (R l, ...).

    At rest the layers are cut into S parts in their order, whatever R is, so that a checkpoint
    knows nothing of it.  A stage runs the groups stage, S + stage, 2 S + stage, ...  Groups are
    exchanged in R permutations of the stages, once a step and their gradients once.
    """
    held = a.reshape(repeats, -1, *a.shape[1:])
    if repeats == 1:
        return held
    table = moves(s, repeats)
    stage = jax.lax.axis_index(AXIS)
    arrived = jnp.zeros_like(held)
    for move in table:
        sent = held[jnp.array([place for place, _, _ in move])[stage]]
        here = jax.lax.ppermute(sent, AXIS, [(i, to) for i, (_, to, _) in enumerate(move)])
        lands = dict((to, repeat) for _, to, repeat in move)
        arrived = arrived.at[jnp.array([lands[i] for i in range(s)])[stage]].set(here)
    return arrived


def moves(s: int, repeats: int) -> list[list[tuple[int, int, int]]]:
    """R permutations that bring every group to its stage.

    Returns:
      For each of them, for each stage: the place of a group among those that it holds, the stage
      that runs it, and the repeat in which it does.
    """
    # Stages i and i + S / gcd hold groups of the same destinations: they begin at other places.
    alike = s // math.gcd(s, repeats)
    table = []
    for i in range(repeats):
        places = [(i + stage // alike) % repeats for stage in range(s)]
        groups = [stage * repeats + place for stage, place in enumerate(places)]
        table.append([(p, g % s, g // s) for p, g in zip(places, groups, strict=True)])
    return table
