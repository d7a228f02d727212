"""Interface of a dispatcher: two functions with the experts between them, and its costs.

    dispatch(x_tD, routing, n_experts, max_rows, kernels) -> Arrived
    combine(out_RD, state, kernels) -> y_tD

`dispatch` moves the row of each token to the devices of its experts.  There each row gets the sum
of its experts' results, weighted by its gates; `combine` brings the sums home and adds those of
each token (V1 eq. 9).  A dispatcher owns no parameters, and knows neither how experts are chosen
nor how they compute.  Both functions run on one shard of the mesh, inside of `shard_map` if there
is one.

Shapes: t tokens of one shard, D hidden, K activated per token, e experts of this device, R rows
that it receives, W choices of one of them here, N assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.dispatch.volume import Volume
from dsmoe_jax.moe.types import Routing


class Arrived(NamedTuple):
    """Rows at the device of some of their experts.

    Attributes:
      rows_RD: in any order.
      routing: of those rows over the e experts of this device, (R, W); id e is no choice.
      state: for `combine`, to bring the sums home.
      n_rows: how many came, int32; the rest of R is undefined and has no choices.  None: all.
    """

    rows_RD: jax.Array
    routing: Routing
    state: Any = None
    n_rows: jax.Array | None = None


class Grouped(NamedTuple):
    """Rows at their experts, one for each assignment.

    Attributes:
      rows_ND: grouped by expert; rows past the last group are padding.
      group_sizes_e: int32, rows of each of this device's experts.
      state: for `local.combine`.
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
    """

    computed_E: jax.Array
    exchanged_rows: jax.Array | None = None


class Dispatcher(NamedTuple):
    """A dispatcher in the registry: its functions, and all that others must know of them.

    Attributes:
      dispatch: see the head of this file; `max_rows` is the most assignments that this device
        receives, None: unbounded.
      combine: brings the sums of this device's experts back to the tokens.
      volume: `(moe, t, p) -> Volume`, what t tokens a chip cost on p chips.
      needs_mesh: works between the devices of a mesh.
      splits_experts: the experts may lie on several devices.
      drops_by_shard: accepts a fixed number of rows from each shard, so each shard drops for
        itself.
    """

    dispatch: Callable[..., Arrived]
    combine: Callable[..., jax.Array]
    volume: Callable[[MoEConfig, int, int], Volume]
    needs_mesh: bool = True
    splits_experts: bool = True
    drops_by_shard: bool = False
