"""Rows and experts on one device: groups rows by expert, sums weighted results.

`stay` and `back` are the dispatcher of a shard that holds all experts: nothing travels.

Shapes: T tokens, D hidden, E experts, K activated per token, N = T*K assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from dsmoe_jax.moe.dispatch.types import Arrived, Grouped
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


def stay(
    x_TD: jax.Array, routing: Routing, n_experts: int, max_rows: int | None, kernels: RowKernels
) -> Arrived:
    """The tokens as they are."""
    del n_experts, max_rows, kernels
    return Arrived(x_TD, routing)


def back(out_TD: jax.Array, state: None, kernels: RowKernels) -> jax.Array:
    """The sums as they are."""
    del state, kernels
    return out_TD


def dispatch(x_TD: jax.Array, routing: Routing, n_experts: int, kernels: RowKernels) -> Grouped:
    """Sorts the assignments by expert and gathers their tokens' rows.

    Nothing is dropped.  The sort is stable, so equal inputs give equal bits.

    Args:
      x_TD: tokens.
      routing: of those tokens.
      n_experts: E.
      kernels: row kernels in use.
    """
    order_N, rank_TK, group_sizes_E = kernels.group(routing.ids_TK, n_experts)
    rows_ND = kernels.gather_tokens(x_TD, order_N, rank_TK)
    return Grouped(rows_ND, group_sizes_E, Sorted(routing.gates_TK, rank_TK, order_N))


def combine(out_ND: jax.Array, state: Sorted, kernels: RowKernels) -> jax.Array:
    """Sums the results of each token, weighted by its gates: y_TD."""
    return kernels.combine_rows(out_ND, *state)
