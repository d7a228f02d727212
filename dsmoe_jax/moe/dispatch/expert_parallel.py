"""Dispatch between the devices of the mesh axis `expert`, each of which holds some experts.

These functions run on every shard, inside of `shard_map`; they look like `local`, which does the
last step of each.  A device is asked by a token at most once, whatever number of its experts the
token chose: the row travels with its choices there and their gates, and what comes back is their
weighted sum.  So a router that is limited to M devices (V2 section 2.1.2) sends M rows a token.
It also bounds what a device can get: each token once.

Shapes: t tokens of this shard, D hidden, E experts of which e on each device, K activated per
token, P devices, R rows received, W = min(K, e) choices of a token on one device, C slots for what
one device sends another, N = t*K assignments.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.dispatch.exchange import exchange
from dsmoe_jax.moe.dispatch.local import RunExperts, combine_rows, gather_tokens, group, local
from dsmoe_jax.moe.types import Routing

AXIS = "expert"


def all_to_all(
    x_tD: jax.Array, routing: Routing, n_experts: int, run_experts: RunExperts, max_load: int
) -> tuple[jax.Array, jax.Array]:
    """Ragged exchange: what is sent is what is needed, nothing is padded.

    Args:
      x_tD: tokens of this shard.
      routing: of those tokens, over all E experts.
      n_experts: E.
      run_experts: computes rows grouped by expert with the e experts of this device.
      max_load: the most assignments that one device gets from all P; its buffers have that size.

    Returns:
      y_tD, and the rows that each of this device's experts computed, int32 (e,).
    """
    n_devices, (t, k) = jax.lax.axis_size(AXIS), routing.ids_TK.shape
    device_tK = distinct(routing.ids_TK // (n_experts // n_devices), n_devices)
    order_N, rank_tK, sizes_P = group(device_tK, n_devices)
    order_N = order_N[: t * min(k, n_devices)]
    sent_PP = jax.lax.all_gather(sizes_P, AXIS)
    n_received = min(n_devices * t, max_load)
    return _visit(
        x_tD, routing, n_experts, run_experts, max_load, device_tK, order_N, rank_tK,
        lambda rows: exchange(rows, sent_PP, n_received, AXIS),
        lambda rows: exchange(rows, sent_PP.T, order_N.size, AXIS),
    )  # fmt: skip


def capacity(
    x_tD: jax.Array, routing: Routing, n_experts: int, run_experts: RunExperts, max_load: int
) -> tuple[jax.Array, jax.Array]:
    """Exchange of fixed size: each device has `max_load / P` slots for each other one.

    It is for routings out of which moe/capacity.py has dropped what would not fit.  Arguments and
    result are those of `all_to_all`.
    """
    n_devices, (t, k) = jax.lax.axis_size(AXIS), routing.ids_TK.shape
    n_slots = min(t, max_load // n_devices)
    device_tK = distinct(routing.ids_TK // (n_experts // n_devices), n_devices)
    order_N, rank_tK, sizes_P = group(device_tK, n_devices)
    # Stretch the groups: slot c of device p is the c-th row of its group, or empty (assignment N).
    starts_P = jnp.cumsum(sizes_P) - sizes_P
    slot_C = jnp.arange(n_slots)
    order_PC = order_N.at[starts_P[:, None] + slot_C].get(mode="fill", fill_value=t * k)
    order_PC = jnp.where(slot_C < sizes_P[:, None], order_PC, t * k)
    start_tK = starts_P.at[device_tK].get(mode="fill", fill_value=0)
    slot_tK = jnp.where(
        device_tK < n_devices, device_tK * n_slots + rank_tK - start_tK, n_devices * n_slots
    )
    swap = lambda rows: jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True)  # noqa: E731
    return _visit(
        x_tD, routing, n_experts, run_experts, max_load, device_tK, order_PC.reshape(-1), slot_tK,
        swap, swap,
    )  # fmt: skip


def all_gather(
    x_tD: jax.Array, routing: Routing, n_experts: int, run_experts: RunExperts, max_load: int
) -> tuple[jax.Array, jax.Array]:
    """Every device sees all tokens, computes its own experts, and the results are added up.

    Arguments and result are those of `all_to_all`.
    """
    e, me = n_experts // jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    x_TD, ids_TK, gates_TK = (
        jax.lax.all_gather(a, AXIS, tiled=True) for a in (x_tD, routing.ids_TK, routing.gates_TK)
    )
    choices_TW, gates_TW = choices_on(jnp.full(x_TD.shape[0], me), ids_TK, gates_TK, e)
    y_TD, computed_e = _run_choices(x_TD, choices_TW, gates_TW, e, run_experts, max_load)
    return jax.lax.psum_scatter(y_TD, AXIS, tiled=True), computed_e


def _visit(
    x_tD: jax.Array,
    routing: Routing,
    n_experts: int,
    run_experts: RunExperts,
    max_load: int,
    device_tK: jax.Array,
    order_N: jax.Array,
    rank_tK: jax.Array,
    send: Callable[[jax.Array], jax.Array],
    send_back: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Rows go out by `send` with their choices and gates, are computed, and `send_back` home.

    `device_tK`, `order_N` (row -> assignment) and `rank_tK` (assignment -> row) say which
    assignments travel, as `group` returns it.
    """
    k, e = device_tK.shape[1], n_experts // jax.lax.axis_size(AXIS)
    token_N = order_N // k
    rows_ND = gather_tokens(x_tD, token_N, rank_tK)
    gates_NK = gather_tokens(routing.gates_TK, token_N, rank_tK)
    ids_NK = routing.ids_TK.at[token_N].get(mode="fill", fill_value=n_experts)
    device_N = device_tK.reshape(-1).at[order_N].get(mode="fill", fill_value=-1)
    choices_NW, gates_NW = choices_on(device_N, ids_NK, gates_NK, e)
    w = choices_NW.shape[1]
    # One exchange for both: a float32 holds any number of an expert exactly.
    labels_NW2 = jnp.concatenate([gates_NW, choices_NW.astype(jnp.float32)], axis=1)
    rows_RD, labels_RW2 = send(rows_ND), send(labels_NW2)
    gates_RW, choices_RW = labels_RW2[:, :w], labels_RW2[:, w:].astype(jnp.int32)
    out_RD, computed_e = _run_choices(rows_RD, choices_RW, gates_RW, e, run_experts, max_load)
    travels_tK = (rank_tK < order_N.size) & (device_tK < jax.lax.axis_size(AXIS))
    travels_tK = travels_tK.astype(jnp.float32)
    return combine_rows(send_back(out_RD), travels_tK, rank_tK, order_N), computed_e


def _run_choices(x_RD, choices_RW, gates_RW, e: int, run_experts: RunExperts, max_load: int):
    """`local` for choices as `choices_on` counts them."""
    routing = Routing(jnp.where(choices_RW == 0, e, choices_RW - 1), gates_RW, None)
    return local(x_RD, routing, e, run_experts, max_load)


def choices_on(
    device_N: jax.Array, ids_NK: jax.Array, gates_NK: jax.Array, e: int
) -> tuple[jax.Array, jax.Array]:
    """What each row wants from one device.

    Args:
      device_N: int32, the device of each row.
      ids_NK, gates_NK: all choices of the row's token, over all experts.
      e: experts of one device.

    Returns:
      choices_NW: int32, 1 + the number of the expert on that device; 0 is no choice, so that rows
        of zeros want nothing.
      gates_NW: float32, 0 for no choice.
    """
    here_NK = ids_NK // e == device_N[:, None]
    first_NW = jnp.argsort(~here_NK, axis=1, stable=True)[:, : min(e, ids_NK.shape[1])]
    pick = lambda a_NK: jnp.take_along_axis(jnp.where(here_NK, a_NK, 0), first_NW, axis=1)  # noqa: E731
    return pick(ids_NK % e + 1), pick(gates_NK)


def distinct(device_tK: jax.Array, nobody: int) -> jax.Array:
    """Each token's devices, every one once: repetitions become `nobody`."""
    k = device_tK.shape[1]
    earlier_KK = jnp.tril(jnp.ones((k, k), bool), -1)
    repeated_tK = ((device_tK[:, :, None] == device_tK[:, None, :]) & earlier_KK).any(axis=2)
    return jnp.where(repeated_tK, nobody, device_tK)
