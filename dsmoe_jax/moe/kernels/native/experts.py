"""The expert backend of compiled kernels for CPU, in float32: `grouped_swiglu.cc`.

Nothing is dropped, nothing is padded by more than 7 rows an expert, and each weight is read, and
each weight gradient written, once. Needs a C++ compiler on the machine, see `build`.

Shape suffixes: N rows sorted by expert, D hidden, F expert width, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.kernels.native.build import kernel
from dsmoe_jax.nn.feed_forward import SWIGLU, Activation


def run(
    rows_ND: jax.Array,
    group_sizes_E: jax.Array,
    weights,
    activation: Activation = SWIGLU.activation,
) -> jax.Array:
    """The backend of this file, see `moe/experts.py`; everything is float32.

    Raises:
      ValueError: for another dtype; `NotBuilt`, a ValueError, if the kernels cannot be compiled.
    """
    assert activation == SWIGLU.activation, "`only_swiglu` in BACKENDS"
    assert weights.gate_bias_EF is None, "`only_swiglu` in BACKENDS"
    return _run(rows_ND, group_sizes_E, weights)


@jax.custom_vjp
def _run(rows_ND, group_sizes_E, weights):
    return _forward(rows_ND, group_sizes_E, weights)[0]


def _forward(rows_ND, group_sizes_E, weights):
    if rows_ND.dtype != jnp.float32:
        raise ValueError(
            f"model.moe.expert_backend='native': computes in float32, not {rows_ND.dtype};"
            " must be 'blocked', or model.compute_dtype='float32'"
        )
    projection = _like((rows_ND.shape[0], weights.gate_EFD.shape[1]))
    call = kernel("GroupedSwigluForward", (_like(rows_ND.shape), projection, projection))
    out_ND, *projections = call(rows_ND, group_sizes_E, *weights[:3])
    return out_ND, (rows_ND, group_sizes_E, weights, *projections)


def _backward(saved, d_out_ND):
    rows_ND, group_sizes_E, weights, *projections = saved
    results = [_like(a.shape) for a in (rows_ND, *weights[:3])]
    scratch = [_like(projections[0].shape)] * 3
    call = kernel("GroupedSwigluBackward", [*results, *scratch])
    d_rows_ND, *rest = call(rows_ND, group_sizes_E, *weights[:3], *projections, d_out_ND)
    return d_rows_ND, None, type(weights)(*rest[:3])


_run.defvjp(_forward, _backward)


def _like(shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
