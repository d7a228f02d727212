"""Interface of a dispatcher: two functions with the experts between them, and its costs.

    dispatch(x_tD, routing, n_experts, max_rows, kernels) -> Dispatched
    combine(out_ND, state, kernels) -> y_tD

`dispatch` moves each token's row to its experts; `combine` returns the results and sums those of
each token, weighted by its gates (V1 eq. 9).  A dispatcher owns no parameters, and knows neither
how experts are chosen nor how they compute.  Both functions run on one shard of the mesh, inside of
`shard_map` if there is one.

Shapes: t tokens of one shard, D hidden, K activated per token, e experts of this device, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.dispatch.volume import Volume


class Dispatched(NamedTuple):
    """Rows at their experts.

    Attributes:
      rows_ND: grouped by expert; rows past the last group are padding.
      group_sizes_e: int32, rows of each of this device's experts.
      state: for `combine`, to return the results.
    """

    rows_ND: jax.Array
    group_sizes_e: jax.Array
    state: Any

    def computed(self) -> jax.Array:
        """Rows that each expert computes, int32 (e,): those that are in `rows_ND`."""
        end_e = jnp.minimum(jnp.cumsum(self.group_sizes_e), self.rows_ND.shape[0])
        return jnp.diff(end_e, prepend=0)


class DispatchReport(NamedTuple):
    """Counts of the dispatch of one batch, float32, summed over the mesh.

    Attributes:
      computed_E: rows that reached each expert, counted where it computes them.
      exchanged_rows: distinct pairs of a token and a device other than its own: the rows that have
        to travel, in each direction, each once to a device.  None without a mesh.
      retries: dispatches (0 or 1 a layer and micro-batch) that used smaller chunks because a buffer
        was too small.  None without a mesh.
    """

    computed_E: jax.Array
    exchanged_rows: jax.Array | None = None
    retries: jax.Array | None = None


class Dispatcher(NamedTuple):
    """A dispatcher in the registry: its functions, and all that others must know of them.

    Attributes:
      dispatch: see the head of this file; `max_rows` is the most assignments that this device
        receives, None: unbounded.
      combine: returns the results of the experts to their tokens.
      volume: `(moe, t, p) -> Volume`, what t tokens a chip cost on p chips.
      needs_mesh: works between the devices of a mesh.
      splits_experts: the experts may lie on several devices.
      drops_by_shard: accepts a fixed number of rows from each shard, so each shard drops for
        itself; `buffer_factor` does not apply.
    """

    dispatch: Callable[..., Dispatched]
    combine: Callable[..., jax.Array]
    volume: Callable[[MoEConfig, int, int], Volume]
    needs_mesh: bool = True
    splits_experts: bool = True
    drops_by_shard: bool = False
