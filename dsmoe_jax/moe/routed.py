"""The routed experts: dispatch, experts and combine, composed once.

`dispatch_compute_combine` is the composition.  On one device it runs once, on all tokens.  On a
mesh it runs inside each shard, and inside each chunk of a shard's tokens; the rest of this file
prepares that: specs, weights, chunks.

The mesh is the ambient one (`jax.set_mesh`) with the axes of parallel/mesh.py.  Tokens are split
over its batch axes.  The experts' weights are split too: E over `expert`, F over
`tensor` (each device computes a part of every sum over F) and D over `fsdp` (gathered before use,
so that the gradients are reduce-scattered).

Shapes: T tokens, t of a shard, D hidden, F expert width, E experts, K activated per token, P
devices of the axis `expert`, Q chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe import blocks, dispatch
from dsmoe_jax.moe.dispatch import Arrived, Dispatcher, DispatchReport, local
from dsmoe_jax.moe.dispatch.expert_parallel import exchanged_rows
from dsmoe_jax.moe.experts import Backend, ExpertWeights, JoinedWeights, choose_backend, join
from dsmoe_jax.moe.kernels import JAX_ROWS, RowKernels
from dsmoe_jax.moe.types import Routing
from dsmoe_jax.nn.feed_forward import SWIGLU, Activation, form_of
from dsmoe_jax.nn.quantisation import Matrix, Quantised, in_dtype
from dsmoe_jax.parallel.mesh import BATCH_AXES
from dsmoe_jax.parallel.sharding import batch_shards, here, on_shards, spec

WEIGHT_AXES = ("EFD", "EFD", "EDF", "EF", "EF", "ED")  # of `ExpertWeights`


class Parts(NamedTuple):
    """The chosen parts of the composition; all of them are static."""

    dispatcher: Dispatcher
    backend: Backend
    kernels: RowKernels
    activation: Activation = SWIGLU.activation


Compute = Callable[[Arrived], tuple[jax.Array, jax.Array]]


class Tokens(NamedTuple):
    """Tokens with their routing, as they are cut into shards and chunks."""

    x_TD: jax.Array
    ids_TK: jax.Array
    gates_TK: jax.Array


def routed_experts(
    x_TD: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    moe: MoEConfig,
    kernels: RowKernels,
    max_kept: int | None = None,
) -> tuple[jax.Array, DispatchReport]:
    """The routed experts' weighted sum, on the ambient mesh (`jax.set_mesh`) if there is one.

    Args:
      x_TD: tokens, in the compute dtype.
      routing: of those tokens.
      weights: of all experts, in the dtype of the parameters.
      moe: config of the layer: its `dispatch` and `expert_backend`.
      kernels: row kernels in use.
      max_kept: the most assignments that one shard's tokens have on one device, if dropping bounds
        them (`dropping.max_kept`); None: unbounded.

    Returns:
      y_TD, and the report of the dispatch.

    Raises:
      ValueError: for a dispatcher that the mesh, or its absence, does not allow, or a mesh that
        does not divide experts or weights.
    """
    chex.assert_rank([x_TD, routing.ids_TK, *weights[:3]], [2, 2, 3, 3, 3])
    chex.assert_equal_shape_prefix([x_TD, routing.ids_TK, routing.gates_TK], 1)
    mesh = jax.sharding.get_abstract_mesh()
    dispatch.check_mesh(moe.dispatch.name, expert_devices(), has_mesh=not mesh.empty)
    dispatcher = dispatch.choose_dispatcher(moe.dispatch.name, expert_devices())
    form = form_of(moe.expert)
    backend = choose_backend(
        moe.expert_backend, x_TD.dtype, form, quantised=moe.quantised is not None
    )
    parts = Parts(dispatcher, backend, kernels, form.activation)
    tokens = Tokens(x_TD, routing.ids_TK, routing.gates_TK)
    if dispatcher.needs_mesh or math.prod(mesh.axis_sizes) > 1:
        # The compiled row kernels support neither empty slots nor cut-off rows.
        parts = parts._replace(kernels=JAX_ROWS)
        return _on_mesh(parts, tokens, weights, moe, max_kept)
    weights = in_dtype(weights, x_TD.dtype)
    y_TD, computed_E = on_one_device(parts, weights, tokens)
    return y_TD, DispatchReport(computed_E.astype(jnp.float32))


def dispatch_compute_combine(
    parts: Parts, n_experts: int, compute: Compute, max_rows: int | None, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    """Dispatch, experts and combine for the tokens of one shard or chunk.

    Args:
      parts: dispatcher, backend and row kernels.
      n_experts: E.
      compute: the weighted sums of this device's experts, for each row that arrives.
      max_rows: the most assignments that this device receives; None: unbounded.
      tokens: with a routing over all E experts.

    Returns:
      y_tD, and the rows that each of this device's experts computed, int32 (e,).
    """
    routing = Routing(tokens.ids_TK, tokens.gates_TK, None)
    arrived = parts.dispatcher.dispatch(tokens.x_TD, routing, n_experts, max_rows, parts.kernels)
    chex.assert_equal_shape_prefix([arrived.rows_RD, arrived.routing.ids_TK], 1)
    out_RD, computed_e = compute(arrived)
    chex.assert_equal_shape([out_RD, arrived.rows_RD])
    return parts.dispatcher.combine(out_RD, arrived.state, parts.kernels), computed_e


def on_one_device(
    parts: Parts, weights: ExpertWeights, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    """The composition for a device that holds all experts; weights in the dtype of the tokens."""
    compute = functools.partial(_all_at_once, parts, weights)
    return dispatch_compute_combine(parts, weights.gate_EFD.shape[0], compute, None, tokens)


def _all_at_once(
    parts: Parts, weights: ExpertWeights, arrived: Arrived
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of each row's experts, and the rows of each expert.

    On one device as many rows come as there are assignments, so no room is empty.
    """
    n_experts = weights.gate_EFD.shape[0]
    grouped = local.dispatch(arrived.rows_RD, arrived.routing, n_experts, parts.kernels)
    with jax.named_scope("experts"):
        out_ND = parts.backend.run(
            grouped.rows_ND, grouped.group_sizes_e, weights, parts.activation
        )
    chex.assert_equal_shape([out_ND, grouped.rows_ND])
    return local.combine(out_ND, grouped.state, parts.kernels), grouped.computed()


def _on_mesh(
    parts: Parts,
    tokens: Tokens,
    weights: ExpertWeights,
    moe: MoEConfig,
    max_kept: int | None,
) -> tuple[jax.Array, DispatchReport]:
    """The composition on every shard of the ambient mesh."""
    _check_divides(weights)
    n_experts = weights.gate_EFD.shape[0]
    batch_axes = here(BATCH_AXES)
    replicas = here(("stage", "data", "fsdp"))

    def on_shard(tokens: Tokens, weights: ExpertWeights) -> tuple[jax.Array, DispatchReport]:
        whole = _gather_weights(weights, tokens.x_TD.dtype)
        filled = _fill_up(tokens, moe.dispatch.chunks, n_experts)
        y_tD, computed_e = _in_chunks(parts, whole, filled, moe, max_kept)
        computed_e = jax.lax.psum(computed_e.astype(jnp.float32), replicas)
        rows = jax.lax.psum(exchanged_rows(tokens.ids_TK, n_experts), batch_axes)
        y_tD = jax.lax.psum(y_tD[: tokens.x_TD.shape[0]], "tensor")
        return y_tD, DispatchReport(computed_e, rows)

    replicated = PartitionSpec()
    by_token = spec("TD")
    report: Any = DispatchReport(PartitionSpec("expert"), replicated)  # pyright: ignore
    specs: Any = list(map(_spec_of, weights, WEIGHT_AXES))
    y_TD, report = on_shards(
        on_shard,
        in_specs=(Tokens(by_token, by_token, by_token), ExpertWeights(*specs)),  # pyright: ignore
        out_specs=(by_token, report),
    )(_fill_up(tokens, batch_shards(), n_experts), weights)
    return y_TD[: tokens.x_TD.shape[0]], jax.lax.stop_gradient(report)


def _spec_of(w: Matrix | None, axes: str) -> Any:
    """The partition of weights; the scales of a quantised matrix have no inputs."""
    if isinstance(w, Quantised):
        return dataclasses.replace(w, values=spec(axes), scale=spec(axes[:-1]))
    return None if w is None else spec(axes)


def _in_chunks(
    parts: Parts,
    weights: JoinedWeights,
    tokens: Tokens,
    moe: MoEConfig,
    max_kept: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Runs one chunk of the tokens after the other; the backward pass recomputes each.

    Each has room for any load: all tokens may choose the experts of one device.

    Returns:
      y_tD, and the rows that each expert of this device computed.
    """
    n_devices = jax.lax.axis_size("expert")
    n_experts = moe.n_routed_experts
    n_chunks = moe.dispatch.chunks
    t, k = tokens.ids_TK.shape
    usual = blocks.usual(t // n_chunks, k, n_experts, n_devices, moe.n_identity_experts)
    per_shard = t // n_chunks * min(k, n_experts // n_devices)
    if max_kept is not None:
        per_shard = min(per_shard, max_kept)
    max_rows = n_devices * per_shard

    def compute(arrived: Arrived) -> tuple[jax.Array, jax.Array]:
        run = functools.partial(parts.backend.run_weighted, activation=parts.activation)
        return blocks.weighted_sums(run, arrived, weights, max_rows, usual)

    one = functools.partial(dispatch_compute_combine, parts, n_experts, compute, max_rows)
    if n_chunks == 1:
        return one(tokens)
    chunks = jax.tree.map(lambda a: a.reshape(n_chunks, -1, *a.shape[1:]), tokens)
    recomputed = jax.checkpoint(lambda _, chunk: (None, one(chunk)))
    y_QtD, computed_Qe = jax.lax.scan(recomputed, None, chunks)[1]
    return y_QtD.reshape(tokens.x_TD.shape), computed_Qe.sum(axis=0)


def _gather_weights(weights: ExpertWeights, dtype: jnp.dtype) -> JoinedWeights:
    """The weights of this device's experts, joined and gathered over `fsdp`."""

    def whole(w: Any, axis: int) -> Any:
        if jax.lax.axis_size("fsdp") == 1:
            # XLA on CPU keeps the gather, and turns the weights round and back for it.
            return w
        # What has no such axis are the scales of a matrix, whose inputs are split.
        gather = functools.partial(jax.lax.all_gather, axis_name="fsdp", axis=axis, tiled=True)
        return jax.tree.map(lambda x: gather(x) if axis < x.ndim else x, w)

    # Joined before: a device's part is small.  Cast before the gather: bfloat16 has half the bytes
    # of float32, and quantised matrices have a quarter.
    joined = in_dtype(join(weights), dtype)
    matrices = whole(joined.gate_up_EGD, 2), whole(joined.down_EDF, 1)
    if joined.gate_up_bias_EG is None or joined.down_bias_ED is None:
        return JoinedWeights(*matrices)
    # Every device of `tensor` has a part of the sums over F, which are added up at the end: the
    # bias of the results belongs to one of the parts.
    first = jax.lax.axis_index("tensor") == 0
    down_bias_ED = jnp.where(first, whole(joined.down_bias_ED, 1), 0)
    return JoinedWeights(*matrices, joined.gate_up_bias_EG, down_bias_ED)


def _fill_up(tokens: Tokens, multiple: int, n_experts: int) -> Tokens:
    """Pads with unassigned tokens to a multiple, so that shards and chunks are equal."""
    fill = ((0, -tokens.x_TD.shape[0] % multiple), (0, 0))
    return Tokens(
        jnp.pad(tokens.x_TD, fill),
        jnp.pad(tokens.ids_TK, fill, constant_values=n_experts),
        jnp.pad(tokens.gates_TK, fill),
    )


def expert_devices() -> int:
    """Devices that the ambient mesh splits the experts over."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["expert"]


def _check_divides(weights: ExpertWeights) -> None:
    """Refuses a mesh that would cut experts or weights into unequal parts."""
    sizes = jax.sharding.get_abstract_mesh().shape
    e, f, d = weights.gate_EFD.shape
    for axis, key, value in (
        ("expert", "model.moe.n_routed_experts", e),
        ("tensor", "model.moe.moe_intermediate_size", f),
        ("fsdp", "model.hidden_size", d),
    ):
        if value % sizes[axis]:
            raise ValueError(f"mesh.{axis}={sizes[axis]}: must divide {key}={value}")
    gate_EFD = weights.gate_EFD
    if isinstance(gate_EFD, Quantised) and gate_EFD.inputs and sizes["tensor"] > 1:
        raise ValueError(
            f"mesh.tensor={sizes['tensor']}: splits a row that has one scale for all of"
            f" model.moe.moe_intermediate_size={f}; must be 1, or model.moe.quantised.activations"
            " False"
        )
