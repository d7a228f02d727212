"""Kernels: plain JAX, and compiled ones for CPU.  Which of them run is decided here alone.

    rows      top-k, sorting, gathering and summing rows, in JAX
    blocked   experts in JAX, fast on CPU
    native/   both compiled from C++, for CPU in float32

A layer chooses once in each call, when it is traced: `choose_rows` for the work around the experts,
`experts.choose_backend` for the experts.  Both ask `native_serves`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config.checks import require
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.moe.kernels import native, rows
from dsmoe_jax.moe.types import count_load


class RowKernels(NamedTuple):
    """The work around the experts: functions that have the same signatures in every implementation.

    Attributes:
      top_k: `(x_TE, k) -> values_TK, places_TK`, ties to the lower place.
      group, gather_tokens, combine_rows: see `rows`.
      count: `(ids_TK, n_groups) -> assignments of each group`, float32.
    """

    top_k: Callable[..., tuple[jax.Array, jax.Array]]
    group: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    gather_tokens: Callable[..., jax.Array]
    combine_rows: Callable[..., jax.Array]
    count: Callable[..., jax.Array]


JAX_ROWS = RowKernels(rows.top_k, rows.group, rows.gather_tokens, rows.combine_rows, count_load)
ROW_KERNELS: dict[str, RowKernels] = {
    "jax": JAX_ROWS,
    "native": RowKernels(
        native.rows.top_k,
        native.rows.group,
        native.rows.gather_tokens,
        native.rows.combine_rows,
        native.rows.count,
    ),
}


def native_serves(dtype: jnp.dtype) -> bool:
    """Whether the compiled kernels can be used: on a CPU, in float32, if they can be compiled."""
    return platform() == "cpu" and dtype == jnp.float32 and native.is_there()


def choose_rows(name: str, dtype: jnp.dtype) -> RowKernels:
    """The entry of `choose_rows_name`."""
    return ROW_KERNELS[choose_rows_name(name, dtype)]


def choose_rows_name(name: str, dtype: jnp.dtype) -> str:
    """The row kernels that `model.moe.row_kernels` means, for activations of a dtype.

    "auto" takes the compiled ones where they can be used, on one device.

    Raises:
      ValueError: for an unknown name, or compiled kernels that cannot be used.
    """
    check_rows(name)
    # XLA cannot split the work of a compiled kernel over a mesh.
    one_device = math.prod(jax.sharding.get_abstract_mesh().axis_sizes) == 1
    if name == "auto":
        name = "native" if one_device and native_serves(dtype) else "jax"
    elif name == "native":
        want = "compiled for one CPU device in float32; must be 'auto' or 'jax' here"
        require(one_device and native_serves(dtype), "model.moe.row_kernels", name, want)
    return name


def check_rows(name: str) -> None:
    """Refuses an unknown name of `model.moe.row_kernels`."""
    names = ("auto", *ROW_KERNELS)
    require(name in names, "model.moe.row_kernels", name, f"must be one of {names}")
