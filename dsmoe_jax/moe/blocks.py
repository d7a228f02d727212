"""Experts on a device of a mesh, in as many blocks of rows as have come.

A device must have room for any load, many times the usual one.  What passed over all of that room
would take the time and the memory traffic of the worst case every time.  Here the assignments,
sorted by expert, are taken one block after the other: gather the rows of a block, run the experts,
weigh the results; and stop after the last assignment.  So time and traffic follow the load, and
what is between two products takes the memory of one block.  Nothing is dropped.

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

from dsmoe_jax.moe.dispatch import Arrived
from dsmoe_jax.moe.experts import JoinedWeights, RunWeighted
from dsmoe_jax.moe.kernels import rows
from dsmoe_jax.moe.room import room

# Rows of a block, as a share of those of a balanced load: two blocks serve an eighth more.
SHARE = 9 / 16
# Rows whose choices are summed at a time, as a share of all that may come.
_SHARE_OF_SUMS = 0.0625
_ZEROS = 8  # rows of zeros at the end of a room
# `jax.named_scope` around a loop, with the number of its trips if the load is balanced, which
# planning counts: the program does not know it.
USUAL_TRIPS = "usual_trips_"


class Usual(NamedTuple):
    """Expectations for one device if all choices are equally likely.

    Attributes:
      assignments: to its experts.
      received: rows.
      several: rows received with more than one choice.
    """

    assignments: float
    received: float
    several: float


def usual(t: int, k: int, n_experts: int, n_devices: int, n_identity: int = 0) -> Usual:
    """Expectations of a device that `n_devices` shards of t tokens send to, each with k choices.

    `n_identity` choices more are on no device.
    """
    here = n_experts // n_devices
    n_choices = n_experts + n_identity
    others = n_choices - here
    ways = math.comb(n_choices, k)
    none = math.comb(others, k) / ways
    one = here * math.comb(others, k - 1) / ways
    sent = n_devices * t
    computed = t * k * n_experts / n_choices
    return Usual(computed, sent * (1 - none), sent * max(0.0, 1 - none - one))


class _Work(NamedTuple):
    """Assignments sorted by expert; integers without gradients.

    Attributes:
      order_N: int32, sorted assignment -> place among the R x W; past their end for none.
      rank_RW: int32, place -> sorted assignment; N for none.
      sizes_e: int32, assignments of each expert.
      several_R: int32, the rows with more than one choice, then R.
      place_R: int32, row -> its place among those; R for a row with at most one.
      n_rows: int32, rows that came.
    """

    order_N: jax.Array
    rank_RW: jax.Array
    sizes_e: jax.Array
    several_R: jax.Array
    place_R: jax.Array
    n_rows: jax.Array


class _Static(NamedTuple):
    """Values that are known when the loops are traced."""

    run: RunWeighted
    block: int
    usual: Usual


def weighted_sums(
    run: RunWeighted,
    arrived: Arrived,
    weights: JoinedWeights,
    max_assignments: int,
    usual: Usual,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the results of each row's experts.

    Args:
      run: the backend, with gates.
      arrived: rows received, with their choices.
      weights: of this device's experts.
      max_assignments: the most that can come; N is this or a little more.
      usual: how many are expected.

    Returns:
      y_RD, of which rows that did not come are undefined, and the rows that each expert computed,
      int32 (e,).
    """
    e = weights.gate_up_EGD.shape[0]
    ids_RW, gates_RW, *_ = arrived.routing
    n = min(max_assignments, ids_RW.size)
    block = min(n, max(1, math.ceil(SHARE * usual.assignments)))
    n_rows = arrived.n_rows
    if n_rows is None:
        n_rows = jnp.int32(ids_RW.shape[0])
        usual = usual._replace(received=ids_RW.shape[0])
    work = _sort(ids_RW, n_rows, e, math.ceil(n / block) * block)
    static = _Static(run, block, usual)
    y_RD: Any = _sums(static, work, rows.as_tiles(arrived.rows_RD), gates_RW, weights)
    end_e = jnp.minimum(jnp.cumsum(work.sizes_e), work.order_N.size)
    return rows.as_matrix(y_RD), jnp.diff(end_e, prepend=0)


def _sort(ids_RW: jax.Array, n_rows: jax.Array, e: int, n: int) -> _Work:
    r, w = ids_RW.shape
    order_N, rank_RW, sizes_e = rows.group(ids_RW, e)
    order_N = jnp.pad(order_N[:n], (0, max(0, n - order_N.size)), constant_values=r * w)
    rank_RW = jnp.where(ids_RW < e, rank_RW, n)
    has_several_R = (rank_RW[:, 1:] < n).any(axis=1)
    row_R = jnp.arange(r, dtype=jnp.int32)
    several_R = jnp.sort(jnp.where(has_several_R, row_R, r))
    place_R = jnp.where(has_several_R, jnp.cumsum(has_several_R, dtype=jnp.int32) - 1, r)
    return _Work(order_N, rank_RW, sizes_e, several_R, place_R, n_rows)


# From here on rows of D are `rows.as_tiles`, but inside of a block, where they are multiplied.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    static: _Static, work: _Work, x_RD: jax.Array, gates_RW: jax.Array, weights: JoinedWeights
) -> jax.Array:
    def one_more(i: jax.Array, out_ND: jax.Array) -> jax.Array:
        compute, x_BD, gates_B = _block(static, work, x_RD, gates_RW, i)
        return _put(out_ND, compute(x_BD, gates_B, weights), i)

    out_ND = _loop(static, work, one_more, _room(work.order_N.size + _ZEROS, x_RD))
    return _sum_choices(out_ND, work, static.usual)


def _sums_fwd(static, work, x_RD, gates_RW, weights):
    return _sums(static, work, x_RD, gates_RW, weights), (work, x_RD, gates_RW, weights)


def _sums_bwd(static, saved, dy_RD):
    work, x_RD, gates_RW, weights = saved

    def one_more(i, gradients):
        dx_ND, dgates_N, dweights = gradients
        compute, x_BD, gates_B = _block(static, work, x_RD, gates_RW, i)
        _, transpose = jax.vjp(compute, x_BD, gates_B, weights)
        dx_BD, dgates_B, dblock = transpose(_take_block(static, work, dy_RD, i))
        dweights = jax.tree.map(jnp.add, dweights, dblock)
        return _put(dx_ND, dx_BD, i), _put(dgates_N, dgates_B, i), dweights

    # Sums over blocks are in float32, as the sums inside of a block are.
    none = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    n = work.order_N.size
    start = (_room(n + _ZEROS, x_RD), jnp.zeros(n, gates_RW.dtype), none)
    dx_ND, dgates_N, dweights = _loop(static, work, one_more, start)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    dx_RD = _sum_choices(dx_ND, work, static.usual)
    return None, dx_RD, rows.take(dgates_N, work.rank_RW), dweights


_sums.defvjp(_sums_fwd, _sums_bwd)


def _loop(static: _Static, work: _Work, one_more: Any, start: Any) -> Any:
    """Runs `one_more` for every block that holds assignments."""
    return _few_times(_n_assignments(work), static.usual.assignments, static.block, one_more, start)


def _few_times(n: jax.Array, usual: float, block: int, one_more: Any, start: Any) -> Any:
    """Runs `one_more` for every block that n things are in; `usual` are expected."""
    with jax.named_scope(f"{USUAL_TRIPS}{math.ceil(usual / block)}"):
        return jax.lax.fori_loop(0, (n + block - 1) // block, one_more, start)


def _n_assignments(work: _Work) -> jax.Array:
    return jnp.minimum(work.sizes_e.sum(), work.order_N.size)


def _block(static: _Static, work: _Work, x_RD: jax.Array, gates_RW: jax.Array, i: jax.Array):
    """The computation of a block, its rows and its gates."""
    end_e = jnp.cumsum(work.sizes_e)
    start_e = end_e - work.sizes_e
    first = i * static.block
    inside = functools.partial(jnp.clip, min=0, max=static.block)
    sizes_e = inside(end_e - first) - inside(start_e - first)

    def compute(x_BD: jax.Array, gates_B: jax.Array, weights: JoinedWeights) -> jax.Array:
        with jax.named_scope("experts"):
            return static.run(x_BD, gates_B, sizes_e, weights)

    gates_B = gates_RW.reshape(-1)[_places(static, work, i)]
    return compute, _take_block(static, work, x_RD, i), gates_B


def _take_block(static: _Static, work: _Work, a_RD: jax.Array, i: jax.Array) -> jax.Array:
    """The rows of a block's assignments, as a matrix."""
    n_choices = work.rank_RW.shape[1]
    return rows.as_matrix(rows.take_any(a_RD, _places(static, work, i) // n_choices))


def _places(static: _Static, work: _Work, i: jax.Array) -> jax.Array:
    """The places of a block's assignments; after the last one its first place, which is written."""
    first = i * static.block
    place_B = jax.lax.dynamic_slice_in_dim(work.order_N, first, static.block)
    left = _n_assignments(work) - first
    return jnp.where(jnp.arange(static.block) < left, place_B, place_B[0])


def _room(n: int, like_RD: jax.Array) -> jax.Array:
    """Room for n rows.  What is never written is never read."""
    return room((n, *like_RD.shape[1:]), like_RD.dtype)


def _with_zeros(filled_ND: jax.Array) -> jax.Array:
    """The room with its last `_ZEROS` rows zero, for those who have no row in it to read."""
    zeros = jnp.zeros((_ZEROS, *filled_ND.shape[1:]), filled_ND.dtype)
    return _put_at(filled_ND, zeros, filled_ND.shape[0] - _ZEROS)


def _put(array_N: jax.Array, block_B: jax.Array, i: jax.Array) -> jax.Array:
    """Puts the rows of a block, as a matrix or as tiles, into the room of all."""
    block_B = block_B.reshape(-1, *array_N.shape[1:])
    return _put_at(array_N, block_B, i * block_B.shape[0])


def _put_at(array_N: jax.Array, block_B: jax.Array, first: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array_N, block_B, first, axis=0)


def _sum_choices(out_ND: jax.Array, work: _Work, usual: Usual) -> jax.Array:
    """The sum of each row's choices, added in float32: y_RD in the dtype of `out_ND`."""
    out_ND = _with_zeros(out_ND)
    rest_of = _other_choices(out_ND, work, usual)
    blocks = _Blocks(work.rank_RW.shape[0])
    first_rank = blocks.of(work.rank_RW[:, 0], work.order_N.size)

    def one_more(i: jax.Array, y_RD: jax.Array) -> jax.Array:
        y_BD = rows.take_any(out_ND, first_rank(i)).astype(jnp.float32)
        y_BD = y_BD if rest_of is None else y_BD + rest_of(i)
        return _put(y_RD, y_BD.astype(out_ND.dtype), i)

    y_RD = _few_times(work.n_rows, usual.received, blocks.size, one_more, blocks.room(out_ND))
    return y_RD[: blocks.r]


def _other_choices(out_ND: jax.Array, work: _Work, usual: Usual) -> Any:
    """The sums of all choices but the first, float32, for the i-th block; None with one choice.

    Few rows have several choices on one device, so these are summed apart.
    """
    r, w = work.rank_RW.shape
    if w == 1:
        return None
    blocks = _Blocks(r)
    several = blocks.of(work.several_R, r)

    def one_more(i: jax.Array, rest_RD: jax.Array) -> jax.Array:
        rank_BW = work.rank_RW.at[several(i)].get(mode="fill", fill_value=work.order_N.size)
        return _put(rest_RD, rows.sum_rows(out_ND, rank_BW[:, 1:]), i)

    room_RD = blocks.room(out_ND, _ZEROS)
    n_several = (work.several_R < r).sum()
    rest_RD = _few_times(n_several, usual.several, blocks.size, one_more, room_RD)
    rest_RD = _with_zeros(rest_RD)
    none = rest_RD.shape[0] - _ZEROS
    place = blocks.of(jnp.where(work.place_R < r, work.place_R, none), none)
    return lambda i: rows.take_any(rest_RD, place(i)).astype(jnp.float32)


class _Blocks:
    """Rows received, in blocks whose choices are summed at a time."""

    def __init__(self, r: int):
        self.r = r
        self.size = math.ceil(_SHARE_OF_SUMS * r)
        self._n = math.ceil(r / self.size) * self.size

    def of(self, a_R: jax.Array, fill: int) -> Any:
        """A function that returns the i-th block of an array, filled up with `fill`."""
        a_R = jnp.pad(a_R, (0, self._n - self.r), constant_values=fill)
        return lambda i: jax.lax.dynamic_slice_in_dim(a_R, i * self.size, self.size)

    def room(self, like_RD: jax.Array, more: int = 0) -> jax.Array:
        """Room for all blocks, and some rows more."""
        return _room(self._n + more, like_RD)
