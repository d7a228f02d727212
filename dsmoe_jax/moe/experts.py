"""Third seam, expert compute: contiguous groups of rows in, rows out.

Routing has decided which rows each expert serves and dispatch has sorted them by expert; a
backend only multiplies. All backends compute the same function, `loop` is the oracle.

Shape suffixes: N rows (token-expert assignments, sorted by expert), D hidden, F expert width,
E experts held here.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.moe.kernels import blocked, native


class ExpertWeights(NamedTuple):
    """The SwiGLU matrices of all experts, each stored (out, in) as in PyTorch checkpoints."""

    gate_EFD: jax.Array
    up_EFD: jax.Array
    down_EDF: jax.Array


def run_experts(
    rows_ND: jax.Array, group_sizes_E: jax.Array, weights: ExpertWeights, backend: str
) -> jax.Array:
    """Apply each expert to its contiguous group of rows: `down(silu(gate x) * up x)`.

    Args:
      rows_ND: rows sorted by expert. Rows past the last group are padding: whatever they hold
        (NaN included), their output and their gradient are exactly 0.
      group_sizes_E: int32, rows of each expert; their sum may be less than N.
      weights: matrices of the E experts, of the dtype of the rows.
      backend: a key of `BACKENDS`.

    Returns:
      rows_ND of the dtype of the input; products are accumulated in float32.

    Raises:
      ValueError: unknown backend, or one whose library is not installed.

    Source: DeepSeekMoE (arXiv 2401.06066) eq. 9, the FFN of one expert; SwiGLU: 2002.05202.
    """
    return get_backend(backend)(rows_ND, group_sizes_E, weights)


def loop(rows_ND: jax.Array, group_sizes_E: jax.Array, weights: ExpertWeights) -> jax.Array:
    """The oracle: every expert on all rows, its own rows kept. E times the work needed."""
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
        return jax.lax.ragged_dot(x_NI, w_EIO, group_sizes_E, preferred_element_type=jnp.float32)

    return _grouped_swiglu(grouped_matmul, rows_ND, group_sizes_E, weights)


def tokamax(rows_ND: jax.Array, group_sizes_E: jax.Array, weights: ExpertWeights) -> jax.Array:
    """tokamax's grouped-matmul kernels for TPU and GPU, plain XLA elsewhere.

    tokamax picks the kernel by the *default* device: compiling ahead of time for another one
    needs `jax.default_device(...)` around the trace.
    """
    import tokamax as library
    from absl import flags

    if not flags.FLAGS.is_parsed():  # it would parse sys.argv itself and fail on others' flags
        flags.FLAGS.mark_as_parsed()

    def grouped_matmul(x_NI, w_EOI):
        w_EIO = w_EOI.swapaxes(1, 2)
        return library.ragged_dot(x_NI, w_EIO, group_sizes_E, preferred_element_type=jnp.float32)

    return _grouped_swiglu(grouped_matmul, rows_ND, group_sizes_E, weights)


def expert_of_row(group_sizes_E: jax.Array, n_rows: int) -> jax.Array:
    """Index of the expert that owns each of n_rows sorted rows, E for padding rows: int32 (N,)."""
    ends_E = jnp.cumsum(group_sizes_E)
    return jnp.searchsorted(ends_E, jnp.arange(n_rows), side="right").astype(jnp.int32)


def _grouped_swiglu(grouped_matmul, rows_ND, group_sizes_E, weights: ExpertWeights) -> jax.Array:
    # A kernel may skip rows past the last group, leaving whatever memory held, or multiply them.
    # So they are masked on the way into and out of each matmul: 0 * NaN is NaN in a gradient too.
    in_a_group_N1 = (jnp.arange(rows_ND.shape[0]) < group_sizes_E.sum())[:, None]
    mask = lambda a_NX: jnp.where(in_a_group_N1, a_NX, 0)  # noqa: E731
    x_ND = mask(rows_ND)
    gate_NF = mask(grouped_matmul(x_ND, weights.gate_EFD))
    up_NF = mask(grouped_matmul(x_ND, weights.up_EFD))
    hidden_NF = (jax.nn.silu(gate_NF) * up_NF).astype(x_ND.dtype)
    return mask(grouped_matmul(hidden_NF, weights.down_EDF)).astype(x_ND.dtype)


def _matmul_f32(x_NI: jax.Array, w_OI: jax.Array) -> jax.Array:
    return jnp.einsum("ni,oi->no", x_NI, w_OI, preferred_element_type=jnp.float32)


BACKENDS: dict[str, Callable[[jax.Array, jax.Array, ExpertWeights], jax.Array]] = {
    "loop": loop,
    "blocked": blocked.run,
    "native": native.run,
    "ragged_dot": ragged_dot,
    "tokamax": tokamax,
}


def get_backend(backend: str) -> Callable[[jax.Array, jax.Array, ExpertWeights], jax.Array]:
    """The backend of that name; "auto" is the one that suits the default device.

    Raises:
      ValueError: for an unknown name, or a backend whose library (or compiler) is not installed.
    """
    if backend == "auto":
        return _best_on_cpu if platform() == "cpu" else ragged_dot
    if backend not in BACKENDS:
        known = ["auto", *sorted(BACKENDS)]
        raise ValueError(f"model.moe.expert_backend={backend!r}: must be one of {known}")
    if backend == "tokamax" and find_spec("tokamax") is None:
        raise ValueError(
            "model.moe.expert_backend='tokamax': the tokamax library is not installed; "
            "pip install 'dsmoe_jax[kernels]' or choose 'ragged_dot'"
        )
    if backend == "native":
        try:
            native.library()
        except native.NotBuilt as error:
            raise ValueError(
                f"model.moe.expert_backend='native': {error}, or choose 'blocked'"
            ) from None
    return BACKENDS[backend]


def _best_on_cpu(rows_ND, group_sizes_E, weights: ExpertWeights) -> jax.Array:
    backend = native.run if native.serves("auto", rows_ND) else blocked.run
    return backend(rows_ND, group_sizes_E, weights)
