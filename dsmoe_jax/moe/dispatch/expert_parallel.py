"""Dispatch between the devices of the mesh axis `expert`, each of which holds some experts.

These functions run on every shard, inside of `shard_map`.  A token's row travels to a device at
most once, however many of its experts are there: it carries the choices there and their gates, and
their weighted sum comes back.  A router limited to M devices (V2 section 2.1.2) therefore sends at
most M rows a token, and a device receives each token at most once.

Shapes: t tokens of this shard, D hidden, E experts of which e on each device, K activated per
token, P devices, R rows received, W = min(K, e) choices of a token on one device, C slots for what
one device sends another, N = t*K assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.dispatch.exchange import exchange
from dsmoe_jax.moe.dispatch.types import Arrived
from dsmoe_jax.moe.kernels import RowKernels, rows
from dsmoe_jax.moe.types import Routing, count_load
from dsmoe_jax.nn import kept

AXIS = "expert"


class Trip(NamedTuple):
    """Record of the rows sent to other devices, to return their results.

    Attributes:
      order_N: int32, row sent -> assignment.
      rank_tK: int32, assignment -> row sent; N for those whose row is not sent.
      sent_PP: int32, rows from source (first axis) to destination; None for slots of fixed size.
    """

    order_N: jax.Array
    rank_tK: jax.Array
    sent_PP: jax.Array | None


class Parcels(NamedTuple):
    """The rows of a shard with their labels, grouped by the device that they are sent to."""

    rows_ND: jax.Array
    labels_NW2: jax.Array


def all_to_all(
    x_tD: jax.Array, routing: Routing, n_experts: int, max_rows: int, kernels: RowKernels
) -> Arrived:
    """Ragged exchange: only the rows needed are sent, without padding.

    Args:
      x_tD: tokens of this shard.
      routing: of those tokens, over all E experts.
      n_experts: E.
      max_rows: the most assignments that a device receives from all P; its buffers have that size.
      kernels: row kernels in use.
    """
    n_devices = jax.lax.axis_size(AXIS)
    t, k = routing.ids_TK.shape
    device_tK = distinct(routing.ids_TK // (n_experts // n_devices), n_devices)
    order_N, rank_tK, sizes_P = kernels.group(device_tK, n_devices)
    order_N = order_N[: t * min(k, n_devices)]
    rank_tK = jnp.where(device_tK < n_devices, rank_tK, order_N.size)
    sent_PP = jax.lax.all_gather(sizes_P, AXIS)
    n_received = min(n_devices * t, max_rows)
    trip = Trip(order_N, rank_tK, sent_PP)
    parcels = _pack(x_tD, routing, n_experts, device_tK, trip, kernels)
    parcels = jax.tree.map(lambda a: exchange(a, sent_PP, n_received, AXIS), parcels)
    parcels = kept.named(kept.RECEIVED, parcels)
    n_rows = sent_PP[:, jax.lax.axis_index(AXIS)].sum()
    labels_RW2 = jnp.where((jnp.arange(n_received) < n_rows)[:, None], parcels.labels_NW2, 0)
    received = _unpack(parcels._replace(labels_NW2=labels_RW2), n_experts // n_devices, trip)
    return received._replace(n_rows=n_rows)


def combine_all_to_all(out_RD: jax.Array, trip: Trip, kernels: RowKernels) -> jax.Array:
    """Sends the results home and sums those of each token: y_tD."""
    del kernels
    assert trip.sent_PP is not None
    home_ND = exchange(rows.as_tiles(out_RD), trip.sent_PP.T, trip.order_N.size, AXIS)
    return rows.as_matrix(rows.sum_tokens(home_ND, trip.order_N, trip.rank_tK))


def fixed_slots(
    x_tD: jax.Array, routing: Routing, n_experts: int, max_rows: int, kernels: RowKernels
) -> Arrived:
    """Exchange of fixed size: each device has `max_rows / P` slots for each other one.

    moe/dropping.py has dropped what would not fit.  The arguments are those of `all_to_all`.
    """
    n_devices = jax.lax.axis_size(AXIS)
    t, k = routing.ids_TK.shape
    n_slots = min(t, max_rows // n_devices)
    device_tK = distinct(routing.ids_TK // (n_experts // n_devices), n_devices)
    order_N, rank_tK, sizes_P = kernels.group(device_tK, n_devices)
    # Stretch the groups: slot c of device p is the c-th row of its group, or empty (assignment N).
    starts_P = jnp.cumsum(sizes_P) - sizes_P
    slot_C = jnp.arange(n_slots)
    order_PC = order_N.at[starts_P[:, None] + slot_C].get(mode="fill", fill_value=t * k)
    order_PC = jnp.where(slot_C < sizes_P[:, None], order_PC, t * k)
    start_tK = starts_P.at[device_tK].get(mode="fill", fill_value=0)
    slot_tK = device_tK * n_slots + rank_tK - start_tK
    slot_tK = jnp.where(device_tK < n_devices, slot_tK, n_devices * n_slots)
    trip = Trip(order_PC.reshape(-1), slot_tK, None)
    parcels = _pack(x_tD, routing, n_experts, device_tK, trip, kernels)
    parcels = kept.named(kept.RECEIVED, jax.tree.map(_swap, parcels))
    return _unpack(parcels, n_experts // n_devices, trip)


def combine_fixed_slots(out_RD: jax.Array, trip: Trip, kernels: RowKernels) -> jax.Array:
    """Same as `combine_all_to_all`, slot for slot."""
    del kernels
    home_ND = _swap(rows.as_tiles(out_RD))
    return rows.as_matrix(rows.sum_tokens(home_ND, trip.order_N, trip.rank_tK))


def all_gather(
    x_tD: jax.Array, routing: Routing, n_experts: int, max_rows: int, kernels: RowKernels
) -> Arrived:
    """Every device sees all tokens and computes its own experts.

    The arguments are those of `all_to_all`.
    """
    del max_rows, kernels
    e = n_experts // jax.lax.axis_size(AXIS)
    x_TD, ids_TK, gates_TK = (
        kept.named(kept.RECEIVED, jax.lax.all_gather(a, AXIS, tiled=True))
        for a in (x_tD, routing.ids_TK, routing.gates_TK)
    )
    here_T = jnp.full(x_TD.shape[0], jax.lax.axis_index(AXIS))
    choices_TW, gates_TW = choices_on(here_T, ids_TK, gates_TK, e)
    return Arrived(x_TD, _routing_here(choices_TW, gates_TW, e))


def combine_all_gather(out_TD: jax.Array, state: None, kernels: RowKernels) -> jax.Array:
    """Sums the results of all devices; each device keeps its own tokens: y_tD."""
    del state, kernels
    return jax.lax.psum_scatter(out_TD, AXIS, tiled=True)


def _swap(rows: jax.Array) -> jax.Array:
    """Exchanges equal blocks of slots: block p goes to device p."""
    return jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True)


def _pack(
    x_tD: jax.Array,
    routing: Routing,
    n_experts: int,
    device_tK: jax.Array,
    trip: Trip,
    kernels: RowKernels,
) -> Parcels:
    """Rows in the order of sending, labelled with their choices on the receiver and the gates."""
    e = n_experts // jax.lax.axis_size(AXIS)
    order_N, rank_tK, _ = trip
    rows_ND = kernels.gather_tokens(rows.as_tiles(x_tD), order_N, rank_tK)
    gates_NK = kernels.gather_tokens(routing.gates_TK, order_N, rank_tK)
    token_N = order_N // device_tK.shape[1]
    ids_NK = routing.ids_TK.at[token_N].get(mode="fill", fill_value=n_experts)
    device_N = device_tK.reshape(-1).at[order_N].get(mode="fill", fill_value=-1)
    choices_NW, gates_NW = choices_on(device_N, ids_NK, gates_NK, e)
    # One exchange for both: a float32 holds the index of any expert exactly.
    labels_NW2 = jnp.concatenate([gates_NW, choices_NW.astype(jnp.float32)], axis=1)
    return Parcels(rows_ND, labels_NW2)


def _unpack(received: Parcels, e: int, trip: Trip) -> Arrived:
    """The received rows with their choices on this device."""
    rows_RD, labels_RW2 = received
    w = labels_RW2.shape[1] // 2
    gates_RW = labels_RW2[:, :w]
    choices_RW = labels_RW2[:, w:].astype(jnp.int32)
    return Arrived(rows.as_matrix(rows_RD), _routing_here(choices_RW, gates_RW, e), trip)


def _routing_here(choices_RW: jax.Array, gates_RW: jax.Array, e: int) -> Routing:
    """A routing over this device's experts, from choices as `choices_on` counts them."""
    return Routing(jnp.where(choices_RW == 0, e, choices_RW - 1), gates_RW, None)


def choices_on(
    device_N: jax.Array, ids_NK: jax.Array, gates_NK: jax.Array, e: int
) -> tuple[jax.Array, jax.Array]:
    """Each row's choices among the experts of one device.

    Args:
      device_N: int32, the device of each row.
      ids_NK, gates_NK: all choices of the row's token, over all experts.
      e: experts of one device.

    Returns:
      choices_NW: int32, 1 + the index of the expert on that device; 0 is no choice, so that a row
        of zeros has none.
      gates_NW: float32, 0 for no choice.
    """
    here_NK = ids_NK // e == device_N[:, None]
    first_NW = jnp.argsort(~here_NK, axis=1, stable=True)[:, : min(e, ids_NK.shape[1])]

    def pick(a_NK: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.where(here_NK, a_NK, 0), first_NW, axis=1)

    return pick(ids_NK % e + 1), pick(gates_NK)


def distinct(device_tK: jax.Array, unassigned: int) -> jax.Array:
    """Devices of each token, each once: repetitions become `unassigned`."""
    k = device_tK.shape[1]
    earlier_KK = jnp.tril(jnp.ones((k, k), bool), -1)
    repeated_tK = ((device_tK[:, :, None] == device_tK[:, None, :]) & earlier_KK).any(axis=2)
    return jnp.where(repeated_tK, unassigned, device_tK)


def exchanged_rows(ids_tK: jax.Array, n_experts: int) -> jax.Array:
    """Distinct (token, other device) pairs of this shard, float32 scalar."""
    n_devices = jax.lax.axis_size(AXIS)
    device_tK = distinct(ids_tK // (n_experts // n_devices), n_devices)
    load_P = count_load(device_tK, n_devices)
    return load_P.sum() - load_P[jax.lax.axis_index(AXIS)]
