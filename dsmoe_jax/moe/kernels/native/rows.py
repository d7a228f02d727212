"""The functions of `kernels/rows.py` compiled for CPU, in float32: `rows.cc`.

Each has the same arguments and results as the one in plain JAX.

Shapes: T tokens, D hidden, E experts, K activated per token, N = T*K assignments.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.kernels.native.build import kernel


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_k(x_TE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Same as `jax.lax.top_k`, bit for bit, ties and NaN included."""
    shape = (x_TE.shape[0], k)
    values_TK, places_TK = kernel("TopK", (_floats(shape), _ints(shape)))(x_TE)
    return values_TK, places_TK


@top_k.defjvp
def _top_k_jvp(k, primals, tangents):
    values_TK, places_TK = top_k(primals[0], k)
    dvalues_TK = jnp.take_along_axis(tangents[0], places_TK, axis=1)
    return (values_TK, places_TK), (dvalues_TK, jnp.zeros(places_TK.shape, jax.dtypes.float0))


def group(ids_TK: jax.Array, n_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Same as `kernels.rows.group`."""
    results = _ints((ids_TK.size,)), _ints(ids_TK.shape), _ints((n_groups,))
    order_N, rank_TK, sizes = kernel("Group", results)(ids_TK)
    return order_N, rank_TK, sizes


def count(ids_TK: jax.Array, n_groups: int) -> jax.Array:
    """Same as `types.count_load`, by the kernel that groups rows."""
    return group(ids_TK, n_groups)[2].astype(jnp.float32)


@jax.custom_vjp
def gather_tokens(x_TD: jax.Array, order_N: jax.Array, rank_TK: jax.Array) -> jax.Array:
    """Same as `kernels.rows.gather_tokens`."""
    shape = (order_N.size, x_TD.shape[1])
    return kernel("Gather", _floats(shape), k=rank_TK.shape[1])(x_TD, order_N)


def _gather_tokens_fwd(x_TD, order_N, rank_TK):
    return gather_tokens(x_TD, order_N, rank_TK), rank_TK


def _gather_tokens_bwd(rank_TK, dy_ND):
    return _sum(dy_ND, jnp.ones(rank_TK.shape, jnp.float32), rank_TK), None, None


gather_tokens.defvjp(_gather_tokens_fwd, _gather_tokens_bwd)


@jax.custom_vjp
def combine_rows(
    out_ND: jax.Array, gates_TK: jax.Array, rank_TK: jax.Array, order_N: jax.Array
) -> jax.Array:
    """Same as `kernels.rows.combine_rows`."""
    del order_N
    return _sum(out_ND, gates_TK, rank_TK)


def _combine_rows_fwd(out_ND, gates_TK, rank_TK, order_N):
    return _sum(out_ND, gates_TK, rank_TK), (out_ND, gates_TK, order_N)


def _combine_rows_bwd(saved, dy_TD):
    out_ND, gates_TK, _ = saved
    results = _floats(out_ND.shape), _floats(gates_TK.shape)
    return *kernel("SumBackward", results)(*saved, dy_TD), None, None


combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)


def _sum(rows_ND, gates_TK, rank_TK):
    shape = (rank_TK.shape[0], rows_ND.shape[1])
    return kernel("Sum", _floats(shape))(rows_ND, gates_TK, rank_TK)


def _floats(shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ints(shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
