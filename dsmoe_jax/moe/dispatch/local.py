"""Dispatch on one shard that holds all experts: sorts rows by expert, sums weighted results.

Shapes: T tokens, D hidden, E experts, K activated per token, N = T*K assignments (or
`max_rows` of them).
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from dsmoe_jax.moe.dispatch.types import Dispatched
from dsmoe_jax.moe.kernels import RowKernels
from dsmoe_jax.moe.types import Routing


class Sorted(NamedTuple):
    """Assignments sorted by expert.

    Attributes:
      gates_TK: weight of each assignment.
      rank_TK: int32, assignment -> sorted row.
      order_N: int32, sorted row -> assignment.
    """

    gates_TK: jax.Array
    rank_TK: jax.Array
    order_N: jax.Array


def dispatch(
    x_TD: jax.Array, routing: Routing, n_experts: int, max_rows: int | None, kernels: RowKernels
) -> Dispatched:
    """Sorts the assignments by expert and gathers their tokens' rows.

    Nothing is dropped.  The sort is stable, so equal inputs give equal bits.

    Args:
      x_TD: tokens.
      routing: of those tokens.
      n_experts: E.
      max_rows: the most assignments that are not unassigned; None: all T*K.
      kernels: row kernels in use.
    """
    order_N, rank_TK, group_sizes_E = kernels.group(routing.ids_TK, n_experts)
    order_N = order_N[:max_rows]
    rows_ND = kernels.gather_tokens(x_TD, order_N, rank_TK)
    return Dispatched(rows_ND, group_sizes_E, Sorted(routing.gates_TK, rank_TK, order_N))


def combine(out_ND: jax.Array, state: Sorted, kernels: RowKernels) -> jax.Array:
    """Sums the results of each token, weighted by its gates: y_TD."""
    return kernels.combine_rows(out_ND, *state)
