"""Third seam, expert compute: contiguous groups of rows in, rows out.

Routing has decided which rows each expert serves and dispatch has sorted them by expert; a backend
only multiplies.  All backends compute the same function; `loop` is the slow one that the others are
tested against.

    run(rows_ND, group_sizes_E, weights) -> rows_ND

Row blocks of `group_sizes_E` rows go to experts 0, 1, ...; rows past the last group are padding:
whatever they hold (NaN included), their output and their gradient are exactly 0.  The weights are
of the dtype of the rows; products are accumulated in float32.

A new backend is such a function and a line in `BACKENDS`.

Source: DeepSeekMoE (arXiv 2401.06066) eq. 9, the FFN of one expert; SwiGLU: 2002.05202.

Shapes: N rows (assignments, sorted by expert), D hidden, F expert width, E experts held here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config.checks import require
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.moe.kernels import blocked, native, native_serves


class ExpertWeights(NamedTuple):
    """The SwiGLU matrices of all experts, each stored (out, in) as in PyTorch checkpoints."""

    gate_EFD: jax.Array
    up_EFD: jax.Array
    down_EDF: jax.Array


def loop(rows_ND: jax.Array, group_sizes_E: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Runs every expert on all rows and keeps its own: E times the work, but easy to verify."""
    owner_N = expert_of_row(group_sizes_E, rows_ND.shape[0])

    def one_expert(out_ND, expert_and_weights):
        expert, w = expert_and_weights
        mine_N1 = (owner_N == expert)[:, None]
        # Masked before the matmuls, not only after: 0 * NaN would reach the weight gradients.
        y_ND = swiglu(jnp.where(mine_N1, rows_ND, 0), *w)
        return jnp.where(mine_N1, y_ND, out_ND), None

    experts = (jnp.arange(group_sizes_E.shape[0]), weights)
    return jax.lax.scan(one_expert, jnp.zeros_like(rows_ND), experts)[0]


def swiglu(x_ND: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array) -> jax.Array:
    """One expert: `down(silu(gate x) * up x)`, accumulated in float32, in the dtype of x."""
    gate_NF = _matmul_f32(x_ND, gate_FD)
    up_NF = _matmul_f32(x_ND, up_FD)
    hidden_NF = (jax.nn.silu(gate_NF) * up_NF).astype(x_ND.dtype)
    return _matmul_f32(hidden_NF, down_DF).astype(x_ND.dtype)


def ragged_dot(rows_ND: jax.Array, group_sizes_E: jax.Array, weights: ExpertWeights) -> jax.Array:
    """`jax.lax.ragged_dot`: XLA's own grouped matmul. Good on TPU; on CPU E times the work."""

    def grouped_matmul(x_NI, w_EOI):
        w_EIO = w_EOI.swapaxes(1, 2)
        return jax.lax.ragged_dot(x_NI, w_EIO, group_sizes_E, preferred_element_type=x_NI.dtype)

    return _grouped_swiglu(grouped_matmul, rows_ND, group_sizes_E, weights)


def tokamax(rows_ND: jax.Array, group_sizes_E: jax.Array, weights: ExpertWeights) -> jax.Array:
    """tokamax's grouped-matmul kernels for TPU and GPU, plain XLA elsewhere.

    tokamax picks the kernel by the *default* device: compiling ahead of time for another one
    needs `jax.default_device(...)` around the trace.
    """
    import tokamax as library
    from absl import flags

    if not flags.FLAGS.is_parsed():  # tokamax would parse sys.argv and fail on our flags
        flags.FLAGS.mark_as_parsed()

    def grouped_matmul(x_NI, w_EOI):
        w_EIO = w_EOI.swapaxes(1, 2)
        return library.ragged_dot(x_NI, w_EIO, group_sizes_E, preferred_element_type=x_NI.dtype)

    return _grouped_swiglu(grouped_matmul, rows_ND, group_sizes_E, weights)


def expert_of_row(group_sizes_E: jax.Array, n_rows: int) -> jax.Array:
    """Index of the expert that owns each of n_rows sorted rows, E for padding rows: int32 (N,)."""
    ends_E = jnp.cumsum(group_sizes_E)
    return jnp.searchsorted(ends_E, jnp.arange(n_rows), side="right").astype(jnp.int32)


def _grouped_swiglu(grouped_matmul, rows_ND, group_sizes_E, weights: ExpertWeights) -> jax.Array:
    # The products are accumulated in float32 and rounded to the dtype of the rows: between two of
    # them a bfloat16 has half the bytes to move.
    # A kernel may skip rows past the last group, leaving whatever memory held, or multiply them.
    # So they are masked on the way into and out of each matmul: 0 * NaN is NaN in a gradient too.
    in_a_group_N1 = (jnp.arange(rows_ND.shape[0]) < group_sizes_E.sum())[:, None]

    def mask(a_NX):
        return jnp.where(in_a_group_N1, a_NX, 0)

    x_ND = mask(rows_ND)
    gate_NF = mask(grouped_matmul(x_ND, weights.gate_EFD))
    up_NF = mask(grouped_matmul(x_ND, weights.up_EFD))
    silu_NF = jax.nn.silu(gate_NF.astype(jnp.float32))
    hidden_NF = (silu_NF * up_NF.astype(jnp.float32)).astype(x_ND.dtype)
    return mask(grouped_matmul(hidden_NF, weights.down_EDF))


def _matmul_f32(x_NI: jax.Array, w_OI: jax.Array) -> jax.Array:
    return jnp.einsum("ni,oi->no", x_NI, w_OI, preferred_element_type=jnp.float32)


def _tokamax_missing() -> str:
    if find_spec("tokamax") is not None:
        return ""
    return (
        "the tokamax library is not installed; pip install 'dsmoe_jax[kernels]' or choose"
        " 'ragged_dot'"
    )


def _native_missing() -> str:
    try:
        native.library()
    except native.NotBuilt as error:
        return f"{error}, or choose 'blocked'"
    return ""


RunExperts = Callable[[jax.Array, jax.Array, ExpertWeights], jax.Array]


class Backend(NamedTuple):
    """A backend in the registry.

    Attributes:
      run: the function, see the head of this file.
      missing: returns why it cannot run on this machine, "" if it can; None: it always can.
      default_device: picks its kernel by JAX's default device, so that compiling ahead of time for
        another one needs `jax.default_device`.
    """

    run: RunExperts
    missing: Callable[[], str] | None = None
    default_device: bool = False


BACKENDS: dict[str, Backend] = {
    "loop": Backend(loop),
    "blocked": Backend(blocked.run),
    "native": Backend(native.run, missing=_native_missing),
    "ragged_dot": Backend(ragged_dot),
    "tokamax": Backend(tokamax, missing=_tokamax_missing, default_device=True),
}


def check_backend(name: str) -> None:
    """Refuses a `model.moe.expert_backend` that is unknown or cannot run here.

    Raises:
      ValueError: saying what is missing.
    """
    key = "model.moe.expert_backend"
    known = ["auto", *sorted(BACKENDS)]
    require(name in known, key, name, f"must be one of {known}")
    missing = BACKENDS[name].missing if name in BACKENDS else None
    if missing is not None and (reason := missing()):
        raise ValueError(f"{key}={name!r}: {reason}")


def choose_backend(name: str, dtype: jnp.dtype) -> Backend:
    """The backend of `model.moe.expert_backend`, for rows of a dtype.

    "auto" is the one that suits the device: on a CPU `native` where it serves and else `blocked`,
    on accelerators `ragged_dot`.

    Raises:
      ValueError: as `check_backend`.
    """
    check_backend(name)
    if name == "auto":
        on_cpu = "native" if native_serves(dtype) else "blocked"
        name = on_cpu if platform() == "cpu" else "ragged_dot"
    return BACKENDS[name]
