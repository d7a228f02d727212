"""The ragged exchange between the devices of a mesh axis, and its gradient.

Every device holds rows grouped by destination and sends each group to its device.  All devices
know how many rows each pair exchanges: they have gathered that matrix before.

Shapes: P devices of the axis, N rows here before, R rows here after, `...` any other axes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.moe.room import room


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange(rows: jax.Array, sent_PP: jax.Array, n_received: int, axis_name: str) -> jax.Array:
    """Sends each device its group of rows; to be called by all devices of the axis.

    Args:
      rows: (N, ...), grouped by destination, the groups in order and without gaps from row 0 on.
      sent_PP: int32, rows that the source (first axis) sends to the destination (second).
      n_received: R, rows of the result; the caller guarantees that no more are sent here.
      axis_name: the mesh axis.

    Returns:
      (R, ...): the rows received, grouped by source, from row 0 on; the rest is undefined.
    """
    me = jax.lax.axis_index(axis_name)
    received = room((n_received, *rows.shape[1:]), rows.dtype)
    starts_PP = jnp.cumsum(sent_PP, axis=1) - sent_PP  # of a group among its source's rows
    lands_PP = jnp.cumsum(sent_PP, axis=0) - sent_PP  # of a group among its destination's rows
    # Not `jax.lax.platform_dependent`: its conditional keeps XLA from overlapping the exchange.
    send = gathered_all_to_all if platform() == "cpu" else jax.lax.ragged_all_to_all
    return send(
        rows, received, starts_PP[me], sent_PP[me], lands_PP[me], sent_PP[:, me],
        axis_name=axis_name,
    )  # fmt: skip


def _exchange_fwd(rows, sent_PP, n_received, axis_name):
    return exchange(rows, sent_PP, n_received, axis_name), (sent_PP, rows.shape[0])


def _exchange_bwd(n_received, axis_name, saved, d_received):
    """The exchange in the other direction, with the transposed matrix."""
    del n_received
    sent_PP, n_rows = saved
    return exchange(d_received, sent_PP.T, n_rows, axis_name), None


exchange.defvjp(_exchange_fwd, _exchange_bwd)


def gathered_all_to_all(
    operand, output, input_offsets_P, send_sizes_P, output_offsets_P, recv_sizes_P, *, axis_name
):
    """`jax.lax.ragged_all_to_all` for the CPU, where XLA has none: every device gets everything.

    A row is received if source and destination both count it; the caller ensures that they agree.
    """
    me = jax.lax.axis_index(axis_name)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    # For the group that each source sends here: its start, its size, and where it lands.
    source = jnp.arange(send_sizes_P.shape[0])[:, None]
    start, size, lands = (
        gather(a)[:, me, None] for a in (input_offsets_P, send_sizes_P, output_offsets_P)
    )
    offset_PR = jnp.arange(output.shape[0]) - lands
    comes_PR = (offset_PR >= 0) & (offset_PR < jnp.minimum(size, recv_sizes_P[:, None]))
    # At most one source has a row for each place: the sum over the sources picks it.
    row_R = jnp.where(comes_PR, source * operand.shape[0] + start + offset_PR, 0).sum(axis=0)
    rows = gather(operand, tiled=True)[row_R]
    comes = comes_PR.any(axis=0).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(comes, rows, output)
