"""Dispatch on one shard, where all experts are: sort by expert, compute, weigh, add up.

Shapes: T tokens, D hidden, E experts, K activated per token, N = T*K assignments (or the most of
them that can be real).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.kernels.native import rows
from dsmoe_jax.moe.types import Routing, count_load

# (rows_ND grouped by expert, group_sizes_E) -> rows_ND
RunExperts = Callable[[jax.Array, jax.Array], jax.Array]


def local(
    x_TD: jax.Array,
    routing: Routing,
    n_experts: int,
    run_experts: RunExperts,
    max_load: int | None = None,
    compiled: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Sorts the N assignments by expert, computes them, adds up each token's weighted results.

    Nothing is dropped.  The sort is stable, so equal inputs give equal bits.

    Args:
      x_TD: tokens.
      routing: of those tokens.
      n_experts: E.
      run_experts: computes rows that are grouped by expert.
      max_load: at most this many assignments are not to nobody; None: all may be.
      compiled: use the kernels of moe/native/rows.py (float32 on a CPU); not with `max_load`.

    Returns:
      y_TD, and the rows that each expert computed, int32 (E,).
    """
    if compiled:
        assert max_load is None
        order_N, rank_TK, group_sizes_E = rows.group(routing.ids_TK, n_experts)
        rows_ND = rows.gather_tokens(x_TD, order_N, rank_TK)
        out_ND = run_experts(rows_ND, group_sizes_E)
        return rows.combine_rows(out_ND, routing.gates_TK, rank_TK, order_N), group_sizes_E
    order_N, rank_TK, group_sizes_E = group(routing.ids_TK, n_experts)
    order_N = order_N[:max_load]
    rows_ND = gather_tokens(x_TD, order_N // routing.ids_TK.shape[1], rank_TK)
    out_ND = run_experts(rows_ND, group_sizes_E)
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E), rows_ND.shape[0])  # no row is past the last one
    computed_E = jnp.diff(end_E, prepend=0)
    return combine_rows(out_ND, routing.gates_TK, rank_TK, order_N), computed_E


def group(ids_TK: jax.Array, n_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts assignments by what they go to; those to nobody (id `n_groups`) come last.

    Returns:
      order_N: int32, sorted row -> assignment.
      rank_TK: int32, assignment -> sorted row.
      sizes: int32 (n_groups,), rows of each group.
    """
    n, id_N = ids_TK.size, ids_TK.reshape(-1)
    if (n_groups + 1) * n < 2**31:
        # One key that holds group and place: a sort of pairs costs six times as much on CPU.
        order_N = jnp.sort(id_N * n + jnp.arange(n, dtype=jnp.int32)) % n
    else:
        order_N = jnp.argsort(id_N, stable=True)
    rank_N = jnp.zeros(n, jnp.int32).at[order_N].set(jnp.arange(n, dtype=jnp.int32))
    sizes = count_load(ids_TK, n_groups).astype(jnp.int32)
    return order_N, rank_N.reshape(ids_TK.shape), sizes


@jax.custom_vjp
def gather_tokens(x_TD: jax.Array, token_N: jax.Array, rank_TK: jax.Array) -> jax.Array:
    """`x_TD[token_N]`: each token's row once per assignment; 0 where there is no such token.

    Its transpose would be a scatter-add, slow on every platform and in no fixed order; since we
    know where each token's K copies went (`rank_TK`; past the last row: nowhere), the gradient is
    a gather and a sum over K.
    """
    del rank_TK
    return _take(x_TD, token_N)


def _gather_tokens_fwd(x_TD, token_N, rank_TK):
    return _take(x_TD, token_N), rank_TK


def _gather_tokens_bwd(rank_TK, dy_ND):
    return _sum_rows(dy_ND, rank_TK).astype(dy_ND.dtype), None, None


gather_tokens.defvjp(_gather_tokens_fwd, _gather_tokens_bwd)


@jax.custom_vjp
def combine_rows(
    out_ND: jax.Array, gates_TK: jax.Array, rank_TK: jax.Array, order_N: jax.Array
) -> jax.Array:
    """Adds each token's K expert outputs, weighted by its gates (V1 eq. 9), in float32.

    Returns:
      y_TD in the dtype of `out_ND`.
    """
    del order_N
    return _sum_rows(out_ND, rank_TK, gates_TK).astype(out_ND.dtype)


def _combine_rows_fwd(out_ND, gates_TK, rank_TK, order_N):
    return combine_rows(out_ND, gates_TK, rank_TK, order_N), (out_ND, gates_TK, rank_TK, order_N)


def _combine_rows_bwd(saved, dy_TD):
    out_ND, gates_TK, rank_TK, order_N = saved
    dy_ND = _take(dy_TD, order_N // gates_TK.shape[1]).astype(jnp.float32)
    dgates_N = (out_ND.astype(jnp.float32) * dy_ND).sum(axis=1)
    dgates_TK = _take(dgates_N, rank_TK).astype(gates_TK.dtype)
    dout_ND = _take(gates_TK.reshape(-1), order_N)[:, None] * dy_ND
    return dout_ND.astype(out_ND.dtype), dgates_TK, None, None


combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)


def _sum_rows(rows_ND: jax.Array, rank_TK: jax.Array, gates_TK=None) -> jax.Array:
    """`sum_k gate_tk rows[rank_tk]` in float32, one k at a time: never K rows of every token."""
    total_TD = jnp.zeros((rank_TK.shape[0], rows_ND.shape[1]), jnp.float32)
    for k in range(rank_TK.shape[1]):
        row_TD = _take(rows_ND, rank_TK[:, k]).astype(jnp.float32)
        total_TD += row_TD if gates_TK is None else gates_TK[:, k, None] * row_TD
    return total_TD


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """`array[index]` along the first axis, 0 past its end."""
    return array.at[index].get(mode="fill", fill_value=0)
