"""The three products of a grouped matrix product, one by one, beside a dense one of as many FLOPs.

A backend may be fast forward and slow backward, so each leg is timed alone: `forward` is rows times
the matrix of their group, `d rows` the gradient of the rows, `d weights` that of the matrices.  The
groups are uneven, as a trained router leaves them.  One process, interleaved; a ratio is the median
over rounds of (time of the dense product / time of the leg in the same round): 1 is its speed.

Shapes: N rows, I and O numbers of a row before and after, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, moe_layer
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.moe.experts import BACKENDS, GroupedProduct, choose_backend

DENSE = "dense"


class Shape(NamedTuple):
    """Rows in all, and the matrices that they are multiplied with."""

    rows: int
    n_experts: int
    hidden_size: int
    expert_width: int


SIZES = {
    "2b": Shape(16_384 * 7, 63, 1280, 853),  # the paper's 2B model, 16,384 tokens
    "16b": Shape(16_384 * 6, 64, 2048, 1408),
    "smoke": Shape(96, 6, 32, 24),
}


def uneven_sizes(shape: Shape) -> np.ndarray:
    """Rows of each expert, int32 (E,); the largest is `moe_layer.REAL_SKEW` times the mean."""
    preference_E = np.random.default_rng(1).standard_normal(shape.n_experts)
    low, high = 0.0, 8.0
    for _ in range(40):
        scale = (low + high) / 2
        share_E = np.exp(scale * preference_E)
        share_E /= share_E.sum()
        too_even = share_E.max() * shape.n_experts < moe_layer.REAL_SKEW
        low, high = (scale, high) if too_even else (low, scale)
    ends_E = np.round(np.cumsum(share_E) * shape.rows).astype(np.int32)
    return np.diff(ends_E, prepend=0)


def measure(backend: str, shape: Shape, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each leg of both products of an expert: up (D to F) and down (F to D).

    Raises:
      ValueError: for a backend that cannot run here or has no product of its own; and whatever its
        compiler raises.
    """
    product = choose_backend(backend, jnp.dtype(dtype)).product
    if product is None:
        raise ValueError(f"{backend}: computes whole experts, it has no product to be timed")
    found = []
    for name, n_in, n_out in (
        ("up", shape.hidden_size, shape.expert_width),
        ("down", shape.expert_width, shape.hidden_size),
    ):
        legs = _legs(product, shape, n_in, n_out, jnp.dtype(dtype))
        seconds = harness.interleaved(legs, repeats, warm_up=1)
        gflop = 2 * shape.rows * n_in * n_out / 1e9
        for leg in legs:
            ms = 1e3 * float(np.median(seconds[leg]))
            ratio = float(np.median(np.divide(seconds[DENSE], seconds[leg])))
            found.append(
                {"product": name, "leg": leg, "ms": ms, "tflops": gflop / ms, "of_dense": ratio}
            )
    return found


def _legs(
    product: GroupedProduct, shape: Shape, n_in: int, n_out: int, dtype: jnp.dtype
) -> dict[str, Callable[[], object]]:
    """The legs, compiled, and the dense product, by name."""
    rng = np.random.default_rng(0)

    def array(*sizes: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(sizes, np.float32), dtype)

    x_NI, dy_NO = array(shape.rows, n_in), array(shape.rows, n_out)
    w_EOI = array(shape.n_experts, n_out, n_in)
    sizes_E = jnp.asarray(uneven_sizes(shape))

    def forward(x_NI, w_EOI, dy_NO):
        del dy_NO
        return product(x_NI, w_EOI, sizes_E)

    def d_rows(x_NI, w_EOI, dy_NO):
        (dx_NI,) = jax.vjp(lambda x: product(x, w_EOI, sizes_E), x_NI)[1](dy_NO)
        return dx_NI

    def d_weights(x_NI, w_EOI, dy_NO):
        (dw_EOI,) = jax.vjp(lambda w: product(x_NI, w, sizes_E), w_EOI)[1](dy_NO)
        return dw_EOI

    def dense(x_NI, w_EOI, dy_NO):
        del dy_NO
        return jnp.einsum("ni,oi->no", x_NI, w_EOI[0])

    functions = {DENSE: dense, "forward": forward, "d rows": d_rows, "d weights": d_weights}
    arguments = (x_NI, w_EOI, dy_NO)
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    return {
        name: lambda run=run: jax.block_until_ready(run(*arguments))
        for name, run in compiled.items()
    }


def main() -> None:
    parser = harness.flag_parser("benchmarks.legs", __doc__, 9)
    parser.add_argument("--size", choices=list(SIZES), default="2b")
    parser.add_argument("--backends", default="", help="comma-separated (default all that can)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    keep_freed_memory()
    rows = [
        {"backend": name, **row}
        for name in [n for n in args.backends.split(",") if n] or having_products()
        for row in measure(name, SIZES[args.size], args.dtype, args.repeats)
    ]
    about = {"size": args.size, "dtype": args.dtype, "repeats": args.repeats}
    harness.write({**harness.device_header(), **about, "rows": rows}, args.json)
    print(harness.table(rows))


def having_products() -> list[str]:
    """The backends whose product can be timed on this machine."""
    return [
        name
        for name, backend in BACKENDS.items()
        if backend.product is not None and not (backend.missing and backend.missing())
    ]


if __name__ == "__main__":
    main()
