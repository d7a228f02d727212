"""Experts on a device of a mesh, in as many blocks of rows as have come.

A device must have room for any load, many times the usual one.  What passed over all of that room
would take the time and the memory traffic of the worst case every time.  Here the assignments,
sorted by expert, are taken one block after the other: gather the rows of a block, run the experts,
weigh the results; and stop after the last assignment.  So time and traffic follow the load, and
what is between two products takes the memory of one block.  Nothing is dropped.  (The room for
received rows, of which each comes at most once, is passed over whole.)

The gradient runs each block again: only the arguments are saved.

Shapes: R rows received, D hidden, W choices of a row on this device, e experts of it, N assignments
that may come, B of a block.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.experts import ExpertWeights, RunExperts
from dsmoe_jax.moe.kernels import rows
from dsmoe_jax.moe.types import Routing

# Rows of a block, as a share of those of a balanced load.
SHARE = 0.5
# Rows with several choices that are summed at a time, as a share of all.
_SHARE_OF_SEVERAL = 0.125
_ZEROS = 8  # rows: a tile of a TPU in float32
# `jax.named_scope` around a loop, with the number of its trips if the load is balanced, which
# planning counts: the program does not know it.
USUAL_TRIPS = "usual_trips_"


class Usual(NamedTuple):
    """Expectations for one device if all choices are equally likely.

    Attributes:
      assignments: to its experts.
      several: rows received with more than one choice.
    """

    assignments: float
    several: float


def usual(t: int, k: int, n_experts: int, n_devices: int) -> Usual:
    """Expectations of a device that `n_devices` shards of t tokens send to, each with k choices."""
    others = n_experts - n_experts // n_devices
    ways = math.comb(n_experts, k)
    none = math.comb(others, k) / ways
    one = (n_experts - others) * math.comb(others, k - 1) / ways
    return Usual(t * k, n_devices * t * max(0.0, 1 - none - one))


class _Work(NamedTuple):
    """Assignments sorted by expert; integers without gradients.

    Attributes:
      order_N: int32, sorted assignment -> place among the R x W; past their end for none.
      rank_RW: int32, place -> sorted assignment; N for none.
      sizes_e: int32, assignments of each expert.
      several_R: int32, the rows with more than one choice, then R.
      place_R: int32, row -> its place among those; R for a row with at most one.
    """

    order_N: jax.Array
    rank_RW: jax.Array
    sizes_e: jax.Array
    several_R: jax.Array
    place_R: jax.Array


class _Static(NamedTuple):
    """Values that are known when the loops are traced."""

    run: RunExperts
    block: int
    usual: Usual


def weighted_sums(
    run: RunExperts,
    x_RD: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    max_assignments: int,
    usual: Usual,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the results of each row's experts.

    Args:
      run: the backend.
      x_RD: rows received.
      routing: of those rows over the experts of this device, (R, W); id e is no choice.
      weights: of this device's experts.
      max_assignments: the most that can come; N is this or a little more.
      usual: how many are expected.

    Returns:
      y_RD, and the rows that each expert computed, int32 (e,).
    """
    e = weights.gate_EFD.shape[0]
    n = min(max_assignments, routing.ids_TK.size)
    n_blocks = math.ceil(n / max(1, math.ceil(SHARE * usual.assignments)))
    block = math.ceil(n / n_blocks)
    work = _sort(routing.ids_TK, e, n_blocks * block)
    y_RD: Any = _sums(_Static(run, block, usual), work, x_RD, routing.gates_TK, weights)
    end_e = jnp.minimum(jnp.cumsum(work.sizes_e), work.order_N.size)
    return y_RD, jnp.diff(end_e, prepend=0)


def _sort(ids_RW: jax.Array, e: int, n: int) -> _Work:
    r, w = ids_RW.shape
    order_N, rank_RW, sizes_e = rows.group(ids_RW, e)
    order_N = jnp.pad(order_N[:n], (0, max(0, n - order_N.size)), constant_values=r * w)
    rank_RW = jnp.where(ids_RW < e, rank_RW, n)
    has_several_R = (rank_RW[:, 1:] < n).any(axis=1)
    row_R = jnp.arange(r, dtype=jnp.int32)
    several_R = jnp.sort(jnp.where(has_several_R, row_R, r))
    place_R = jnp.where(has_several_R, jnp.cumsum(has_several_R, dtype=jnp.int32) - 1, r)
    return _Work(order_N, rank_RW, sizes_e, several_R, place_R)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    static: _Static, work: _Work, x_RD: jax.Array, gates_RW: jax.Array, weights: ExpertWeights
) -> jax.Array:
    def one_more(i: jax.Array, out_ND: jax.Array) -> jax.Array:
        compute, x_BD, gates_B = _block(static, work, x_RD, gates_RW, i)
        return _put(out_ND, compute(x_BD, gates_B, weights), i)

    out_ND = _loop(static, work, one_more, _room(work, x_RD))
    return _sum_choices(out_ND, work, static.usual)


def _sums_fwd(static, work, x_RD, gates_RW, weights):
    return _sums(static, work, x_RD, gates_RW, weights), (work, x_RD, gates_RW, weights)


def _sums_bwd(static, saved, dy_RD):
    work, x_RD, gates_RW, weights = saved

    def one_more(i, gradients):
        dx_ND, dgates_N, dweights = gradients
        compute, x_BD, gates_B = _block(static, work, x_RD, gates_RW, i)
        _, transpose = jax.vjp(compute, x_BD, gates_B, weights)
        dout_BD = rows.take_any(dy_RD, _places(static, work, i) // gates_RW.shape[1])
        dx_BD, dgates_B, dblock = transpose(dout_BD)
        dweights = jax.tree.map(jnp.add, dweights, dblock)
        return _put(dx_ND, dx_BD, i), _put(dgates_N, dgates_B, i), dweights

    # Sums over blocks are in float32, as the sums inside of a block are.
    none = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    start = (_room(work, x_RD), jnp.zeros(work.order_N.size, gates_RW.dtype), none)
    dx_ND, dgates_N, dweights = _loop(static, work, one_more, start)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    dx_RD = _sum_choices(dx_ND, work, static.usual)
    return None, dx_RD, rows.take(dgates_N, work.rank_RW), dweights


_sums.defvjp(_sums_fwd, _sums_bwd)


def _loop(static: _Static, work: _Work, one_more: Any, start: Any) -> Any:
    """Runs `one_more` for every block that holds assignments."""
    n = jnp.minimum(work.sizes_e.sum(), work.order_N.size)
    usual_trips = math.ceil(static.usual.assignments / static.block)
    with jax.named_scope(f"{USUAL_TRIPS}{usual_trips}"):
        return jax.lax.fori_loop(0, _ceil(n, static.block), one_more, start)


def _block(static: _Static, work: _Work, x_RD: jax.Array, gates_RW: jax.Array, i: jax.Array):
    """The computation of a block, its rows and its gates."""
    place_B = _places(static, work, i)
    end_e = jnp.cumsum(work.sizes_e)
    start_e = end_e - work.sizes_e
    first = i * static.block
    inside = functools.partial(jnp.clip, min=0, max=static.block)
    sizes_e = inside(end_e - first) - inside(start_e - first)

    def compute(x_BD: jax.Array, gates_B: jax.Array, weights: ExpertWeights) -> jax.Array:
        with jax.named_scope("experts"):
            out_BD = static.run(x_BD, sizes_e, weights)
            return (gates_B[:, None] * out_BD.astype(jnp.float32)).astype(x_BD.dtype)

    x_BD = rows.take_any(x_RD, place_B // gates_RW.shape[1])
    return compute, x_BD, rows.take(gates_RW.reshape(-1), place_B)


def _places(static: _Static, work: _Work, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(work.order_N, i * static.block, static.block)


def _room(work: _Work, x_RD: jax.Array) -> jax.Array:
    """Room for a row of each assignment that may come.  What is never written is never read."""
    return _empty(work.order_N.size, x_RD)


def _empty(n: int, like_RD: jax.Array) -> jax.Array:
    """An array of n rows, and room for `_with_zeros`."""
    return jax.lax.empty((n + _ZEROS, like_RD.shape[1]), like_RD.dtype)


def _with_zeros(filled_ND: jax.Array) -> jax.Array:
    """The array with zeros at its end, for those who have no row in it to read."""
    zeros = jnp.zeros((_ZEROS, filled_ND.shape[1]), filled_ND.dtype)
    return jax.lax.dynamic_update_slice_in_dim(
        filled_ND, zeros, filled_ND.shape[0] - _ZEROS, axis=0
    )


def _put(array_N: jax.Array, block_B: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array_N, block_B, i * block_B.shape[0], axis=0)


def _sum_choices(out_ND: jax.Array, work: _Work, usual: Usual) -> jax.Array:
    """The sum of each row's choices, added in float32: y_RD in the dtype of `out_ND`.

    Few rows have several choices on one device.  Their other choices are summed apart, in as many
    blocks as there are such rows.
    """
    r, w = work.rank_RW.shape
    out_ND = _with_zeros(out_ND)
    first_RD = rows.take_any(out_ND, work.rank_RW[:, 0])
    if w == 1:
        return first_RD
    block = math.ceil(_SHARE_OF_SEVERAL * r)
    n_blocks = math.ceil(r / block)
    several_R = jnp.pad(work.several_R, (0, n_blocks * block - r), constant_values=r)

    def one_more(i: jax.Array, rest_RD: jax.Array) -> jax.Array:
        row_B = jax.lax.dynamic_slice_in_dim(several_R, i * block, block)
        rank_BW = work.rank_RW.at[row_B].get(mode="fill", fill_value=work.order_N.size)
        sum_BD = jnp.zeros((block, out_ND.shape[1]), jnp.float32)
        for j in range(1, w):
            sum_BD += rows.take_any(out_ND, rank_BW[:, j])
        return _put(rest_RD, sum_BD.astype(rest_RD.dtype), i)

    n_several = (work.several_R < r).sum()
    room_RD = _empty(several_R.size, out_ND)
    with jax.named_scope(f"{USUAL_TRIPS}{math.ceil(usual.several / block)}"):
        rest_RD = jax.lax.fori_loop(0, _ceil(n_several, block), one_more, room_RD)
    place_R = jnp.where(work.place_R < r, work.place_R, several_R.size)
    rest_RD = rows.take_any(_with_zeros(rest_RD), place_R)
    return (first_RD.astype(jnp.float32) + rest_RD.astype(jnp.float32)).astype(out_ND.dtype)


def _ceil(n: jax.Array, block: int) -> jax.Array:
    return (n + block - 1) // block
