"""From the whole batch to one shard of the mesh: specs, weights, buffers, chunks.

The mesh is the ambient one (`jax.set_mesh`) with the axes data, fsdp, expert, tensor.  Tokens are
split over data x fsdp x expert.  Of the experts' weights E is split over `expert`, F over `tensor`
(each device computes a part of every sum over F) and D over `fsdp`: gathered before use, so that
their gradients are reduce-scattered.

Shapes: T tokens, t of a shard, D hidden, F expert width, E experts, K activated per token, P
devices of the axis `expert`, Q chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.dispatch.expert_parallel import distinct
from dsmoe_jax.moe.experts import ExpertWeights
from dsmoe_jax.moe.types import Routing, count_load
from dsmoe_jax.parallel.mesh import BATCH_AXES
from dsmoe_jax.parallel.sharding import spec

WEIGHT_SPECS = ExpertWeights._make(spec(letters) for letters in ("EFD", "EFD", "EDF"))

Tokens = tuple[jax.Array, jax.Array, jax.Array]  # x_TD, ids_TK, gates_TK
# (rows_ND grouped by expert, group_sizes_E, weights of those experts) -> rows_ND
RunWeights = Callable[[jax.Array, jax.Array, ExpertWeights], jax.Array]


class Exchange(NamedTuple):
    """What the dispatch of one batch did, float32, summed over the mesh.

    Attributes:
      computed_E: rows that reached each expert, counted where it computes them.
      rows: distinct (token, device) pairs other than the token's own device: what has to travel, in
        each direction, if a row goes to a device once.  None without a mesh.
      retries: dispatches (0 or 1 a layer and micro-batch) for which a buffer was too small and that
        were done in smaller chunks instead.  None without a mesh.
    """

    computed_E: jax.Array
    rows: jax.Array | None = None
    retries: jax.Array | None = None


def on_mesh(
    dispatcher: Callable[..., tuple[jax.Array, jax.Array]],
    x_TD: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    run_experts: RunWeights,
    config: MoEConfig,
    limit: int | None = None,
) -> tuple[jax.Array, Exchange]:
    """Runs a dispatcher on every shard of the ambient mesh.

    Args:
      dispatcher: a value of `DISPATCHERS`.
      x_TD, routing: the whole batch.
      weights: of all experts, of the dtype they are kept in.
      run_experts: the backend.
      config: of the layer.
      limit: the most assignments that one shard's tokens have on one device, where the drop policy
        says so (`capacity.most_kept`); None: no limit.

    Returns:
      y_TD, and what the dispatch did.

    Raises:
      ValueError: for a mesh that does not divide experts or weights.
    """
    check_divides(weights)
    e, tokens = weights.gate_EFD.shape[0], spec("TD")

    def on_shard(x_tD, ids_tK, gates_tK, weights):
        weights = gather_weights(weights, x_tD.dtype)

        def dispatch(max_load, x_tD, ids_tK, gates_tK):
            run = lambda rows_ND, sizes: run_experts(rows_ND, sizes, weights)  # noqa: E731
            return dispatcher(x_tD, Routing(ids_tK, gates_tK, None), e, run, max_load)

        chunked = fill_up(x_tD, ids_tK, gates_tK, config.exchange_chunks, e)
        y_tD, computed_e, retries = in_buffers(dispatch, *chunked, e, config, limit)
        computed_e = jax.lax.psum(computed_e.astype(jnp.float32), ("data", "fsdp"))
        rows = jax.lax.psum(travelling_rows(ids_tK, e), BATCH_AXES)
        y_tD = jax.lax.psum(y_tD[: x_tD.shape[0]], "tensor")
        return y_tD, Exchange(computed_e, rows, retries)

    everywhere = PartitionSpec()
    specs: Any = Exchange(PartitionSpec("expert"), everywhere, everywhere)  # pyright: ignore
    filled = fill_up(x_TD, routing.ids_TK, routing.gates_TK, token_shards(), e)
    # Without check_vma: the backends' loops start from zeros that it would take for replicated.
    y_TD, exchange = jax.shard_map(
        on_shard,
        in_specs=(tokens, tokens, tokens, WEIGHT_SPECS),
        out_specs=(tokens, specs),
        check_vma=False,
    )(*filled, weights)
    return y_TD[: x_TD.shape[0]], jax.lax.stop_gradient(exchange)


def in_buffers(
    dispatch: Callable[..., tuple[jax.Array, jax.Array]],
    x_tD: jax.Array,
    ids_tK: jax.Array,
    gates_tK: jax.Array,
    n_experts: int,
    config: MoEConfig,
    limit: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Dispatches with buffers for what may come at worst, or for `buffer_factor` times the mean.

    If the mean times the factor is too small for any device of the mesh, all do the exchange in
    chunks that are small enough for their worst case: slower, but exact and in the same memory.

    Args:
      dispatch: `(max_load, x_tD, ids_tK, gates_tK) -> (y_tD, computed_e)`.
      x_tD, ids_tK, gates_tK: tokens of this shard and their routing.
      n_experts, config, limit: as for `on_mesh`.

    Returns:
      y_tD, the rows that each expert of this device computed, and 1.0 if it took the smaller
      chunks.
    """
    n_devices, (t, k) = jax.lax.axis_size("expert"), ids_tK.shape
    n_chunks, choices = config.exchange_chunks, min(k, n_experts // jax.lax.axis_size("expert"))

    def worst(n_chunks):
        per_shard = t // n_chunks * choices
        return n_devices * (per_shard if limit is None else min(per_shard, limit))

    def exact(n_chunks, *arrays):
        return in_chunks(n_chunks, lambda *chunk: dispatch(worst(n_chunks), *chunk), *arrays)

    arrays = (x_tD, ids_tK, gates_tK)
    budget = math.ceil(config.buffer_factor * (t // n_chunks) * k)
    if not budget or budget >= worst(n_chunks):
        return *exact(n_chunks, *arrays), jnp.float32(0)
    # From all shards of this group, chunk by chunk, to each device:
    ids_QTK = ids_tK.reshape(n_chunks, -1, k) // (n_experts // n_devices)
    load_QP = jax.lax.psum(jax.vmap(lambda ids: count_load(ids, n_devices))(ids_QTK), "expert")
    retry = jax.lax.pmax((load_QP > budget).any().astype(jnp.float32), BATCH_AXES)
    fitting = [n for n in range(n_chunks, t + 1) if t % n == 0 and worst(n) <= budget]
    y_tD, computed_e = jax.lax.cond(
        retry > 0,
        lambda *arrays: exact(fitting[0] if fitting else t, *arrays),
        lambda *arrays: in_chunks(n_chunks, lambda *chunk: dispatch(budget, *chunk), *arrays),
        *arrays,
    )
    return y_tD, computed_e, retry


def in_chunks(
    n_chunks: int, dispatch: Callable[..., tuple[jax.Array, jax.Array]], *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One chunk of the tokens after the other; in the backward pass too, each computed anew."""
    if n_chunks == 1:
        return dispatch(*arrays)
    chunks = [a.reshape(n_chunks, -1, *a.shape[1:]) for a in arrays]
    one = jax.checkpoint(lambda _, chunk: (None, dispatch(*chunk)))
    y_QtD, computed_Qe = jax.lax.scan(one, None, chunks)[1]
    return y_QtD.reshape(arrays[0].shape), computed_Qe.sum(axis=0)


def gather_weights(weights: ExpertWeights, dtype: jnp.dtype) -> ExpertWeights:
    """The whole D of this device's experts, cast first: half the bytes of float32."""
    whole = lambda w, axis: jax.lax.all_gather(  # noqa: E731
        w.astype(dtype), "fsdp", axis=axis, tiled=True
    )
    return ExpertWeights(
        whole(weights.gate_EFD, 2), whole(weights.up_EFD, 2), whole(weights.down_EDF, 1)
    )


def travelling_rows(ids_tK: jax.Array, n_experts: int) -> jax.Array:
    """Distinct (token, other device) pairs of this shard, float32 scalar."""
    n_devices = jax.lax.axis_size("expert")
    device_tK = distinct(ids_tK // (n_experts // n_devices), n_devices)
    load_P = count_load(device_tK, n_devices)
    return load_P.sum() - load_P[jax.lax.axis_index("expert")]


def fill_up(x_TD, ids_TK, gates_TK, multiple: int, nobody: int) -> Tokens:
    """Adds tokens that go to nobody, up to a multiple: shards and chunks must be equal."""
    fill = ((0, -x_TD.shape[0] % multiple), (0, 0))
    return (
        jnp.pad(x_TD, fill),
        jnp.pad(ids_TK, fill, constant_values=nobody),
        jnp.pad(gates_TK, fill),
    )


def token_shards() -> int:
    """Parts that the ambient mesh splits the tokens into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def expert_devices() -> int:
    """Devices that the ambient mesh splits the experts over."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["expert"]


def check_divides(weights: ExpertWeights) -> None:
    """Refuses a mesh that would cut experts or weights into unequal parts.

    Raises:
      ValueError: naming the axis and what it does not divide.
    """
    sizes, (e, f, d) = jax.sharding.get_abstract_mesh().shape, weights.gate_EFD.shape
    for axis, key, value in (
        ("expert", "model.moe.n_routed_experts", e),
        ("tensor", "model.moe.moe_intermediate_size", f),
        ("fsdp", "model.hidden_size", d),
    ):
        if value % sizes[axis]:
            raise ValueError(f"mesh.{axis}={sizes[axis]}: must divide {key}={value}")
