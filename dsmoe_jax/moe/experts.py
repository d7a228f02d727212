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

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

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


class JoinedWeights(NamedTuple):
    """The same for one product with gate and up: G = 2 F, first the gates' rows, then the ups'."""

    gate_up_EGD: jax.Array
    down_EDF: jax.Array


RunExperts = Callable[[jax.Array, jax.Array, ExpertWeights], jax.Array]
RunWeighted = Callable[[jax.Array, jax.Array, jax.Array, JoinedWeights], jax.Array]
GroupedProduct = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # x_NI, w_EOI, sizes_E


def join(weights: ExpertWeights) -> JoinedWeights:
    """Puts gate and up into one matrix."""
    gate_up_EGD = jnp.concatenate([weights.gate_EFD, weights.up_EFD], axis=1)
    return JoinedWeights(gate_up_EGD, weights.down_EDF)


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
    return _grouped_swiglu(_ragged_dot, rows_ND, group_sizes_E, weights)


def _ragged_dot(x_NI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    w_EIO = w_EOI.swapaxes(1, 2)
    return jax.lax.ragged_dot(x_NI, w_EIO, group_sizes_E, preferred_element_type=x_NI.dtype)


def tokamax(rows_ND: jax.Array, group_sizes_E: jax.Array, weights: ExpertWeights) -> jax.Array:
    """tokamax's grouped-matmul kernels for TPU and GPU, plain XLA elsewhere.

    tokamax picks the kernel by the *default* device: compiling ahead of time for another one
    needs `jax.default_device(...)` around the trace.
    """
    return _grouped_swiglu(_tokamax_dot, rows_ND, group_sizes_E, weights)


def _tokamax_dot(x_NI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    import tokamax as library
    from absl import flags

    if not flags.FLAGS.is_parsed():  # tokamax would parse sys.argv and fail on our flags
        flags.FLAGS.mark_as_parsed()
    w_EIO = w_EOI.swapaxes(1, 2)
    return library.ragged_dot(x_NI, w_EIO, group_sizes_E, preferred_element_type=x_NI.dtype)


def expert_of_row(group_sizes_E: jax.Array, n_rows: int) -> jax.Array:
    """Index of the expert that owns each of n_rows sorted rows, E for padding rows: int32 (N,)."""
    ends_E = jnp.cumsum(group_sizes_E)
    return jnp.searchsorted(ends_E, jnp.arange(n_rows), side="right").astype(jnp.int32)


def _grouped_swiglu(
    product: GroupedProduct,
    rows_ND: jax.Array,
    group_sizes_E: jax.Array,
    weights: ExpertWeights,
) -> jax.Array:
    # The products are accumulated in float32 and rounded to the dtype of the rows: between two of
    # them a bfloat16 has half the bytes to move.
    # A kernel may skip rows past the last group, leaving whatever memory held, or multiply them.
    # So they are masked on the way into and out of each matmul: 0 * NaN is NaN in a gradient too.
    mask = functools.partial(_first, group_sizes_E.sum())
    x_ND = mask(rows_ND)
    gate_NF = mask(product(x_ND, weights.gate_EFD, group_sizes_E))
    up_NF = mask(product(x_ND, weights.up_EFD, group_sizes_E))
    silu_NF = jax.nn.silu(gate_NF.astype(jnp.float32))
    hidden_NF = (silu_NF * up_NF.astype(jnp.float32)).astype(x_ND.dtype)
    return mask(product(hidden_NF, weights.down_EDF, group_sizes_E))


def _weighted_swiglu(
    product: GroupedProduct,
    rows_ND: jax.Array,
    gates_N: jax.Array,
    group_sizes_E: jax.Array,
    weights: JoinedWeights,
) -> jax.Array:
    # The gate before the down product: there its gradient costs no further pass over rows of D.
    gate_up_NG = product(rows_ND, weights.gate_up_EGD, group_sizes_E)
    hidden_NF: Any = _weighted_activation(gate_up_NG, gates_N, group_sizes_E.sum())
    return product(hidden_NF, weights.down_EDF, group_sizes_E)


@jax.custom_vjp
def _weighted_activation(gate_up_NG: jax.Array, gates_N: jax.Array, n_rows: jax.Array) -> jax.Array:
    """`gate silu(g) u` of the first n rows, 0 for others, which may be NaN; in float32 inside.

    Its own gradient, because XLA stores what autodiff shares between the two halves in float32.
    """
    hidden_NF = _activation(*_halves(gate_up_NG)) * gates_N[:, None]
    return _first(n_rows, hidden_NF).astype(gate_up_NG.dtype)


def _weighted_activation_fwd(gate_up_NG, gates_N, n_rows):
    return _weighted_activation(gate_up_NG, gates_N, n_rows), (gate_up_NG, gates_N, n_rows)


def _weighted_activation_bwd(saved, dhidden_NF):
    gate_up_NG, gates_N, n_rows = saved
    g_NF, u_NF = _halves(gate_up_NG)
    dhidden_NF = dhidden_NF.astype(jnp.float32)
    dgates_N = _first(n_rows, _activation(g_NF, u_NF) * dhidden_NF).sum(axis=1)
    dhidden_NF *= gates_N[:, None]
    share_NF = jax.nn.sigmoid(g_NF)
    dg_NF = dhidden_NF * u_NF * share_NF * (1 + g_NF * (1 - share_NF))
    du_NF = dhidden_NF * jax.nn.silu(g_NF)
    halves = (_first(n_rows, d_NF).astype(gate_up_NG.dtype) for d_NF in (dg_NF, du_NF))
    return jnp.concatenate(list(halves), axis=1), dgates_N, None


_weighted_activation.defvjp(_weighted_activation_fwd, _weighted_activation_bwd)


def _activation(g_NF: jax.Array, u_NF: jax.Array) -> jax.Array:
    return jax.nn.silu(g_NF) * u_NF


def _halves(gate_up_NG: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate_NF, up_NF = jnp.split(gate_up_NG, 2, axis=1)
    return gate_NF.astype(jnp.float32), up_NF.astype(jnp.float32)


def _first(n: jax.Array, a_NX: jax.Array) -> jax.Array:
    """Sets rows from the n-th on to zero."""
    return jnp.where((jnp.arange(a_NX.shape[0]) < n)[:, None], a_NX, 0)


def _weighted_after(
    run: RunExperts,
    rows_ND: jax.Array,
    gates_N: jax.Array,
    group_sizes_E: jax.Array,
    weights: JoinedWeights,
) -> jax.Array:
    gate_EFD, up_EFD = jnp.split(weights.gate_up_EGD, 2, axis=1)
    out_ND = run(rows_ND, group_sizes_E, ExpertWeights(gate_EFD, up_EFD, weights.down_EDF))
    return (gates_N[:, None] * out_ND.astype(jnp.float32)).astype(rows_ND.dtype)


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


class Backend(NamedTuple):
    """A backend in the registry.

    Attributes:
      run: the function, see the head of this file.
      missing: returns why it cannot run on this machine, "" if it can; None: it always can.
      default_device: picks its kernel by JAX's default device, so that compiling ahead of time for
        another one needs `jax.default_device`.
      product: of rows with the matrix of their group, for `run_weighted`; None: it has none.
    """

    run: RunExperts
    missing: Callable[[], str] | None = None
    default_device: bool = False
    product: GroupedProduct | None = None

    @property
    def run_weighted(self) -> RunWeighted:
        """The backend with the weights of the results: `(rows_ND, gates_N, sizes_E, joined)`.

        Padding must be finite; its results and gradients are undefined, but reach no others.
        """
        if self.product is None:
            return functools.partial(_weighted_after, self.run)
        return functools.partial(_weighted_swiglu, self.product)


BACKENDS: dict[str, Backend] = {
    "loop": Backend(loop),
    "blocked": Backend(blocked.run),
    "native": Backend(native.run, missing=_native_missing),
    "ragged_dot": Backend(ragged_dot, product=_ragged_dot),
    "tokamax": Backend(
        tokamax, missing=_tokamax_missing, default_device=True, product=_tokamax_dot
    ),
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


def choose_name(name: str, dtype: jnp.dtype) -> str:
    """The backend that `model.moe.expert_backend` means, for rows of a dtype.

    "auto" is the one that suits the device: on a CPU `native` where it serves and else `blocked`,
    on accelerators `ragged_dot`.

    Raises:
      ValueError: as `check_backend`.
    """
    check_backend(name)
    if name != "auto":
        return name
    on_cpu = "native" if native_serves(dtype) else "blocked"
    return on_cpu if platform() == "cpu" else "ragged_dot"


def choose_backend(name: str, dtype: jnp.dtype) -> Backend:
    """The entry of `choose_name`."""
    return BACKENDS[choose_name(name, dtype)]
