"""Third seam, expert compute: contiguous groups of rows in, rows out.

Routing has decided which rows each expert serves and dispatch has sorted them by expert; a backend
only multiplies.  All backends compute the same function; `loop` is the slow one that the others are
tested against.

    run(rows_ND, group_sizes_E, weights, activation) -> rows_ND

Row blocks of `group_sizes_E` rows go to experts 0, 1, ...; rows past the last group are padding:
whatever they hold (NaN included), their output and their gradient are exactly 0.  The weights are
of the dtype of the rows; products are accumulated in float32.  Matrices may be `Quantised`
instead (nn/quantisation), for backends that say so; these have no gradients.

What an expert computes between its products is its form (nn/feed_forward): SwiGLU, or another one
of the open models, with or without biases.  A new backend is such a function and a line in
`BACKENDS`.

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
from dsmoe_jax.nn.feed_forward import SWIGLU, Activation, Form
from dsmoe_jax.nn.quantisation import Matrix, Quantised, times, unscaled


class ExpertWeights(NamedTuple):
    """The matrices of all experts, each stored (out, in) as in PyTorch checkpoints, and biases.

    All matrices are quantised, or none.  The biases are None for experts without; all three are
    there, or none.
    """

    gate_EFD: Matrix
    up_EFD: Matrix
    down_EDF: Matrix
    gate_bias_EF: jax.Array | None = None
    up_bias_EF: jax.Array | None = None
    down_bias_ED: jax.Array | None = None


class JoinedWeights(NamedTuple):
    """The same for one product with gate and up: G = 2 F, first the gates' rows, then the ups'."""

    gate_up_EGD: Matrix
    down_EDF: Matrix
    gate_up_bias_EG: jax.Array | None = None
    down_bias_ED: jax.Array | None = None


RunExperts = Callable[..., jax.Array]  # see the head of this file; the activation may be left out
RunWeighted = Callable[..., jax.Array]  # see `Backend.run_weighted`
GroupedProduct = Callable[..., jax.Array]  # x_NI, w_EOI, sizes_E, dtype of the results (None: x's)
SILU = SWIGLU.activation


def join(weights: ExpertWeights) -> JoinedWeights:
    """Puts gate and up into one matrix, and their biases into one vector."""
    gate_up_EGD = jax.tree.map(
        lambda *halves: jnp.concatenate(halves, axis=1), weights.gate_EFD, weights.up_EFD
    )
    if weights.gate_bias_EF is None:
        return JoinedWeights(gate_up_EGD, weights.down_EDF)
    assert weights.up_bias_EF is not None
    gate_up_bias_EG = jnp.concatenate([weights.gate_bias_EF, weights.up_bias_EF], axis=1)
    return JoinedWeights(gate_up_EGD, weights.down_EDF, gate_up_bias_EG, weights.down_bias_ED)


def split(joined: JoinedWeights) -> ExpertWeights:
    """The weights that `join` has joined."""
    gate_EFD, up_EFD = (
        jax.tree.map(lambda x, half=half: jnp.split(x, 2, axis=1)[half], joined.gate_up_EGD)
        for half in (0, 1)
    )
    if joined.gate_up_bias_EG is None:
        return ExpertWeights(gate_EFD, up_EFD, joined.down_EDF)
    gate_EF, up_EF = jnp.split(joined.gate_up_bias_EG, 2, axis=1)
    return ExpertWeights(gate_EFD, up_EFD, joined.down_EDF, gate_EF, up_EF, joined.down_bias_ED)


def loop(
    rows_ND: jax.Array,
    group_sizes_E: jax.Array,
    weights: ExpertWeights,
    activation: Activation = SILU,
) -> jax.Array:
    """Runs every expert on all rows and keeps its own: E times the work, but easy to verify."""
    owner_N = expert_of_row(group_sizes_E, rows_ND.shape[0])

    def one_expert(out_ND, expert_and_weights):
        expert, w = expert_and_weights
        mine_N1 = (owner_N == expert)[:, None]
        # Masked before the matmuls, not only after: 0 * NaN would reach the weight gradients.
        y_ND = one_expert_on(jnp.where(mine_N1, rows_ND, 0), w, activation)
        return jnp.where(mine_N1, y_ND, out_ND), None

    experts = (jnp.arange(group_sizes_E.shape[0]), weights)
    return jax.lax.scan(one_expert, jnp.zeros_like(rows_ND), experts)[0]


def one_expert_on(x_ND: jax.Array, w: ExpertWeights, activation: Activation) -> jax.Array:
    """One expert, whose weights have no E: accumulated in float32, in the dtype of x."""
    gate_NF = _plus(times(x_ND, w.gate_EFD), w.gate_bias_EF)
    up_NF = _plus(times(x_ND, w.up_EFD), w.up_bias_EF)
    hidden_NF = activation.hidden(gate_NF, up_NF).astype(x_ND.dtype)
    return _plus(times(hidden_NF, w.down_EDF), w.down_bias_ED).astype(x_ND.dtype)


def _plus(y_NO: jax.Array, bias_O: jax.Array | None) -> jax.Array:
    return y_NO if bias_O is None else y_NO + bias_O.astype(y_NO.dtype)


def ragged_dot(
    rows_ND: jax.Array,
    group_sizes_E: jax.Array,
    weights: ExpertWeights,
    activation: Activation = SILU,
) -> jax.Array:
    """`jax.lax.ragged_dot`: XLA's own grouped matmul. Good on TPU; on CPU E times the work."""
    return _grouped(_ragged_dot, rows_ND, group_sizes_E, weights, activation)


def _ragged_dot(
    x_NI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array, dtype: Any = None
) -> jax.Array:
    w_EIO = w_EOI.swapaxes(1, 2)
    dtype = x_NI.dtype if dtype is None else dtype
    return jax.lax.ragged_dot(x_NI, w_EIO, group_sizes_E, preferred_element_type=dtype)


def tokamax(
    rows_ND: jax.Array,
    group_sizes_E: jax.Array,
    weights: ExpertWeights,
    activation: Activation = SILU,
) -> jax.Array:
    """tokamax's grouped-matmul kernels for TPU and GPU, plain XLA elsewhere.

    tokamax picks the kernel by the *default* device: compiling ahead of time for another one
    needs `jax.default_device(...)` around the trace.
    """
    return _grouped(_tokamax_dot, rows_ND, group_sizes_E, weights, activation)


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


def _grouped(
    product: GroupedProduct,
    rows_ND: jax.Array,
    group_sizes_E: jax.Array,
    weights: ExpertWeights,
    activation: Activation = SILU,
) -> jax.Array:
    # The products are accumulated in float32 and rounded to the dtype of the rows: between two of
    # them a bfloat16 has half the bytes to move.
    # A kernel may skip rows past the last group, leaving whatever memory held, or multiply them.
    # So they are masked on the way into and out of each matmul: 0 * NaN is NaN in a gradient too.
    mask = functools.partial(_first, group_sizes_E.sum())

    def masked_product(x_NI: jax.Array, w_EOI: Matrix, bias_EO: jax.Array | None) -> jax.Array:
        y_NO = _times_of_group(product, x_NI, w_EOI, group_sizes_E)
        return mask(_plus_of_group(y_NO, bias_EO, group_sizes_E))

    x_ND = mask(rows_ND)
    gate_NF = masked_product(x_ND, weights.gate_EFD, weights.gate_bias_EF)
    up_NF = masked_product(x_ND, weights.up_EFD, weights.up_bias_EF)
    hidden_NF = activation.hidden(gate_NF.astype(jnp.float32), up_NF.astype(jnp.float32))
    return masked_product(hidden_NF.astype(x_ND.dtype), weights.down_EDF, weights.down_bias_ED)


def _times_of_group(
    product: GroupedProduct, x_NI: jax.Array, w_EOI: Matrix, group_sizes_E: jax.Array
) -> jax.Array:
    """Each row times the matrix of its group, in the dtype of x."""
    if not isinstance(w_EOI, Quantised):
        return product(x_NI, w_EOI, group_sizes_E)

    def of_group(x_NI: jax.Array, w_EOI: jax.Array, dtype: Any) -> jax.Array:
        return product(x_NI, w_EOI, group_sizes_E, dtype)

    sums_NO = unscaled(of_group, x_NI, w_EOI)
    scale_NO = vector_of_rows(w_EOI.scale, group_sizes_E, x_NI.shape[0])
    return (sums_NO * scale_NO).astype(x_NI.dtype)


def _plus_of_group(
    y_NO: jax.Array, bias_EO: jax.Array | None, group_sizes_E: jax.Array
) -> jax.Array:
    if bias_EO is None:
        return y_NO
    return y_NO + vector_of_rows(bias_EO, group_sizes_E, y_NO.shape[0])


def vector_of_rows(vector_EO: jax.Array, group_sizes_E: jax.Array, n_rows: int) -> jax.Array:
    """The bias, or the scales, of each row's expert, (N, O); 0 for padding."""
    # As a product with ones and zeros: its transpose is a product too, and no scatter-add over all
    # rows.  At highest precision it is exact.
    owner_N = expert_of_row(group_sizes_E, n_rows)
    mine_NE = (owner_N[:, None] == jnp.arange(len(vector_EO))).astype(vector_EO.dtype)
    return jnp.matmul(mine_NE, vector_EO, precision="highest")


def _weighted(
    product: GroupedProduct,
    rows_ND: jax.Array,
    gates_N: jax.Array,
    group_sizes_E: jax.Array,
    weights: JoinedWeights,
    activation: Activation = SILU,
) -> jax.Array:
    # The gate before the down product: there its gradient costs no further pass over rows of D.
    gate_up_NG = _times_of_group(product, rows_ND, weights.gate_up_EGD, group_sizes_E)
    gate_up_NG = _plus_of_group(gate_up_NG, weights.gate_up_bias_EG, group_sizes_E)
    hidden_NF: Any = _weighted_activation(activation, gate_up_NG, gates_N, group_sizes_E.sum())
    y_ND = _times_of_group(product, hidden_NF, weights.down_EDF, group_sizes_E)
    if weights.down_bias_ED is None:
        return y_ND
    # The gate weighs all of an expert's output, its bias too.
    bias_ND = vector_of_rows(weights.down_bias_ED, group_sizes_E, rows_ND.shape[0])
    return y_ND + (gates_N[:, None] * bias_ND.astype(jnp.float32)).astype(y_ND.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_activation(
    activation: Activation, gate_up_NG: jax.Array, gates_N: jax.Array, n_rows: jax.Array
) -> jax.Array:
    """`gate h(g, u)` of the first n rows, 0 for others, which may be NaN; in float32 inside.

    Its own gradient, because XLA stores what autodiff shares between the two halves in float32.
    """
    hidden_NF = activation.hidden(*_halves(gate_up_NG)) * gates_N[:, None]
    return _first(n_rows, hidden_NF).astype(gate_up_NG.dtype)


def _weighted_activation_fwd(activation, gate_up_NG, gates_N, n_rows):
    y_NF = _weighted_activation(activation, gate_up_NG, gates_N, n_rows)
    return y_NF, (gate_up_NG, gates_N, n_rows)


def _weighted_activation_bwd(activation, saved, dhidden_NF):
    gate_up_NG, gates_N, n_rows = saved
    g_NF, u_NF = _halves(gate_up_NG)
    dhidden_NF = dhidden_NF.astype(jnp.float32)
    dgates_N = _first(n_rows, activation.hidden(g_NF, u_NF) * dhidden_NF).sum(axis=1)
    gradients = activation.gradient(g_NF, u_NF, dhidden_NF * gates_N[:, None])
    halves = (_first(n_rows, d_NF).astype(gate_up_NG.dtype) for d_NF in gradients)
    return jnp.concatenate(list(halves), axis=1), dgates_N, None


_weighted_activation.defvjp(_weighted_activation_fwd, _weighted_activation_bwd)


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
    activation: Activation = SILU,
) -> jax.Array:
    out_ND = run(rows_ND, group_sizes_E, split(weights), activation)
    return (gates_N[:, None] * out_ND.astype(jnp.float32)).astype(rows_ND.dtype)


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
      only_swiglu: its kernel computes no other form of expert.
      quantised: it computes experts with quantised matrices, too.
    """

    run: RunExperts
    missing: Callable[[], str] | None = None
    default_device: bool = False
    product: GroupedProduct | None = None
    only_swiglu: bool = False
    quantised: bool = False

    @property
    def run_weighted(self) -> RunWeighted:
        """With weights of the results: `(rows_ND, gates_N, sizes_E, joined, activation)`.

        Padding must be finite; its results and gradients are undefined, but reach no others.
        """
        if self.product is None:
            return functools.partial(_weighted_after, self.run)
        return functools.partial(_weighted, self.product)


BACKENDS: dict[str, Backend] = {
    "loop": Backend(loop, quantised=True),
    "blocked": Backend(blocked.run, quantised=True),
    "native": Backend(native.run, missing=_native_missing, only_swiglu=True),
    "ragged_dot": Backend(ragged_dot, product=_ragged_dot, quantised=True),
    "tokamax": Backend(
        tokamax, missing=_tokamax_missing, default_device=True, product=_tokamax_dot
    ),
}


def check_backend(name: str, form: Form = SWIGLU, *, quantised: bool = False) -> None:
    """Refuses a `model.moe.expert_backend` that is unknown or cannot run here.

    Args:
      name: of the backend, or "auto".
      form: of the experts.
      quantised: whether their matrices are.

    Raises:
      ValueError: saying what is missing, or that it computes no such experts.
    """
    key = "model.moe.expert_backend"
    known = ["auto", *sorted(BACKENDS)]
    require(name in known, key, name, f"must be one of {known}")
    if name not in BACKENDS:
        return
    backend = BACKENDS[name]
    others = ["auto", *sorted(n for n, other in BACKENDS.items() if not other.only_swiglu)]
    want = f"computes SwiGLU experts without biases and no others; must be one of {others}"
    require(form == SWIGLU or not backend.only_swiglu, key, name, want)
    others = ["auto", *sorted(n for n, other in BACKENDS.items() if other.quantised)]
    want = f"computes no quantised experts (model.moe.quantised); must be one of {others}"
    require(backend.quantised or not quantised, key, name, want)
    if backend.missing is not None and (reason := backend.missing()):
        raise ValueError(f"{key}={name!r}: {reason}")


def choose_name(
    name: str, dtype: jnp.dtype, form: Form = SWIGLU, *, quantised: bool = False
) -> str:
    """The backend that `model.moe.expert_backend` means, for rows of a dtype.

    "auto" is the one that suits the device: on a CPU `native` where it serves and else `blocked`,
    which is that of quantised experts; on accelerators `ragged_dot`.

    Raises:
      ValueError: as `check_backend`.
    """
    check_backend(name, form, quantised=quantised)
    if name != "auto":
        return name
    serves = form == SWIGLU and not quantised and native_serves(dtype)
    on_cpu = "native" if serves else "blocked"
    return on_cpu if platform() == "cpu" else "ragged_dot"


def choose_backend(
    name: str, dtype: jnp.dtype, form: Form = SWIGLU, *, quantised: bool = False
) -> Backend:
    """The entry of `choose_name`."""
    return BACKENDS[choose_name(name, dtype, form, quantised=quantised)]
