"""The work around the experts in plain JAX: top-k, sorting, gathering and summing rows.

`native/rows.py` has the same functions compiled for CPU.

Shapes: T tokens, D hidden, E experts or other groups, K activated per token, N = T*K assignments
(or the first of them).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.types import count_load

_LANES = 128
_TILE = 8 * _LANES


def top_k(x_TE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The K largest of each row and their places, as `jax.lax.top_k`."""
    values_TK, places_TK = jax.lax.top_k(x_TE, k)
    # Without barriers XLA on CPU sorts whole rows wherever only some columns of the result are
    # used.  One barrier for both crashes its compiler on a mesh that splits no tokens (`tensor`).
    return jax.lax.optimization_barrier(values_TK), jax.lax.optimization_barrier(places_TK)


def group(ids_TK: jax.Array, n_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts assignments by group; unassigned ones (id `n_groups`) come last.

    Returns:
      order_N: int32, sorted row -> assignment.
      rank_TK: int32, assignment -> sorted row.
      sizes: int32 (n_groups,), rows of each group.
    """
    n = ids_TK.size
    id_N = ids_TK.reshape(-1)
    place_N = jnp.arange(n, dtype=jnp.int32)
    if (n_groups + 1) * n < 2**31:
        # One key that holds group and place: a sort of pairs costs six times as much on CPU.
        order_N = jnp.sort(id_N * n + place_N) % n
    else:
        order_N = jnp.argsort(id_N, stable=True)
    rank_N = jnp.zeros(n, jnp.int32).at[order_N].set(place_N)
    sizes = count_load(ids_TK, n_groups).astype(jnp.int32)
    return order_N, rank_N.reshape(ids_TK.shape), sizes


@jax.custom_vjp
def gather_tokens(x_TD: jax.Array, order_N: jax.Array, rank_TK: jax.Array) -> jax.Array:
    """The row of each sorted assignment's token; any row where there is no such token.

    `rank_TK` says where the K copies of a token are, past the last row for none; the gradient is
    their sum.
    """
    return take_any(x_TD, order_N // rank_TK.shape[1])


def _gather_tokens_fwd(x_TD, order_N, rank_TK):
    return gather_tokens(x_TD, order_N, rank_TK), rank_TK


def _gather_tokens_bwd(rank_TK, dy_ND):
    # Not the transpose, a scatter-add: slow on every platform, and in no fixed order.
    return sum_rows(dy_ND, rank_TK), None, None


gather_tokens.defvjp(_gather_tokens_fwd, _gather_tokens_bwd)


@jax.custom_vjp
def sum_tokens(rows_ND: jax.Array, order_N: jax.Array, rank_TK: jax.Array) -> jax.Array:
    """The transpose of `gather_tokens`: the sum of each token's rows, in their dtype."""
    del order_N
    return sum_rows(rows_ND, rank_TK)


def _sum_tokens_fwd(rows_ND, order_N, rank_TK):
    return sum_rows(rows_ND, rank_TK), (order_N, rank_TK)


def _sum_tokens_bwd(saved, dy_TD):
    order_N, rank_TK = saved
    return take_any(dy_TD, order_N // rank_TK.shape[1]), None, None


sum_tokens.defvjp(_sum_tokens_fwd, _sum_tokens_bwd)


@jax.custom_vjp
def combine_rows(
    out_ND: jax.Array, gates_TK: jax.Array, rank_TK: jax.Array, order_N: jax.Array
) -> jax.Array:
    """Adds each token's K expert outputs, weighted by its gates (V1 eq. 9), in float32.

    Returns:
      y_TD in the dtype of `out_ND`.
    """
    del order_N
    return sum_rows(out_ND, rank_TK, gates_TK)


def _combine_rows_fwd(out_ND, gates_TK, rank_TK, order_N):
    return combine_rows(out_ND, gates_TK, rank_TK, order_N), (out_ND, gates_TK, rank_TK, order_N)


def _combine_rows_bwd(saved, dy_TD):
    out_ND, gates_TK, rank_TK, order_N = saved
    dy_ND = take_any(dy_TD, order_N // gates_TK.shape[1]).astype(jnp.float32)
    dgates_N = (out_ND.astype(jnp.float32) * dy_ND).sum(axis=1)
    dgates_TK = take(dgates_N, rank_TK).astype(gates_TK.dtype)
    dout_ND = take(gates_TK.reshape(-1), order_N)[:, None] * dy_ND
    return dout_ND.astype(out_ND.dtype), dgates_TK, None, None


combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)


def sum_rows(
    rows_ND: jax.Array, rank_TK: jax.Array, gates_TK: jax.Array | None = None
) -> jax.Array:
    """`sum_k gate_tk rows[rank_tk]`, added in float32, in the dtype of the rows.

    A rank past the last row adds nothing.
    """
    total_TD = jnp.zeros((rank_TK.shape[0], *rows_ND.shape[1:]), jnp.float32)
    # One k at a time, so that there is never an array of K rows for every token.
    for k in range(rank_TK.shape[1]):
        row_TD = take(rows_ND, rank_TK[:, k]).astype(jnp.float32)
        total_TD += row_TD if gates_TK is None else gates_TK[:, k, None] * row_TD
    return total_TD.astype(rows_ND.dtype)


def as_tiles(x_ND: jax.Array) -> jax.Array:
    """Rows that are moved one by one, each as whole tiles of a TPU: (N, D/128, 128).

    A tile of a matrix holds parts of eight rows, which one row would have to be picked from.
    Returns the matrix itself if D is not a multiple of a tile's 8 x 128 numbers.
    """
    n, d = x_ND.shape
    return x_ND if d % _TILE else x_ND.reshape(n, d // _LANES, _LANES)


def as_matrix(tiles_ND: jax.Array) -> jax.Array:
    """The inverse of `as_tiles`."""
    return tiles_ND.reshape(tiles_ND.shape[0], -1)


def take(array: jax.Array, index: jax.Array) -> jax.Array:
    """`array[index]` along the first axis, 0 past its end."""
    return array.at[index].get(mode="fill", fill_value=0)


def take_any(array: jax.Array, index: jax.Array) -> jax.Array:
    """`array[index]` along the first axis, some element of it past its end.

    Zeros there would cost an accelerator a pass over the result.
    """
    return array.at[index].get(mode="clip")
