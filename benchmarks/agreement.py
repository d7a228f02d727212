"""Agreement of an expert backend with the oracle, `loop`: values and all gradients.

The loads are those that kernels got wrong: uneven, an empty group, one expert that takes all.  Rows
past the last group hold NaN, and must come out as exact zeros.  The oracle computes in float32 from
the same numbers.  An error is a share of the largest magnitude of the oracle's array.

Shapes: N rows, D hidden, F expert width, E experts.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.moe import experts

# Eight units of the last bit of a factor: of TF32, to which a GPU may round float32, of bfloat16.
# Rows of a wrong expert are off by about 1.
TOLERANCES = {"float32": 8 * 2**-11, "bfloat16": 8 * 2**-8}
ORACLE = "loop"
ARRAYS = ("y", "d rows", "d gate", "d up", "d down")


class Shape(NamedTuple):
    """Rows and weights of a grouped product."""

    rows: int
    hidden_size: int
    n_experts: int
    expert_width: int


def loads(shape: Shape) -> dict[str, np.ndarray]:
    """Group sizes, int32 (E,), by name."""
    e, n = shape.n_experts, shape.rows
    share_E = np.random.default_rng(0).gamma(2.0, size=e)
    share_E[e // 2] = 0.0
    uneven_E = np.floor(0.9 * n * share_E / share_E.sum()).astype(np.int32)
    all_E = np.zeros(e, np.int32)
    all_E[e // 3] = n
    return {"uneven, one empty, padding": uneven_E, "one takes all": all_E}


def check(backend: str, shape: Shape, dtype: str) -> list[dict[str, Any]]:
    """A row for each load: the largest error, in which array, and whether it is small enough.

    Args:
      backend: a name in `experts.BACKENDS`.
      shape: of rows and weights.
      dtype: "float32" or "bfloat16".

    Raises:
      ValueError: if the backend cannot run here; and whatever its compiler raises.
    """
    run = experts.choose_backend(backend, jnp.dtype(dtype)).run
    oracle = experts.BACKENDS[ORACLE].run
    rows = []
    for name, sizes_E in loads(shape).items():
        args = _arguments(shape, sizes_E, dtype)
        start = time.perf_counter()
        found = jax.block_until_ready(_value_and_gradients(*args, run=run))
        seconds = time.perf_counter() - start
        in_float32 = [jax.tree.map(_float32, arg) for arg in args]
        with jax.default_matmul_precision("highest"):
            expected = _value_and_gradients(*in_float32, run=oracle)
        errors = _errors(found, expected)
        worst = max(errors, key=lambda array: _ordered(errors[array]))
        zeros = _padding_is_zero(found, int(sizes_E.sum()))
        rows.append(
            {
                "loads": name,
                "error": errors[worst] if np.isfinite(errors[worst]) else None,
                "in": worst,
                "padding_is_zero": zeros,
                "right": zeros and errors[worst] <= TOLERANCES[dtype],
                "first_call_s": seconds,
            }
        )
    return rows


def _arguments(shape: Shape, sizes_E: np.ndarray, dtype: str) -> tuple[Any, ...]:
    """Rows, group sizes, weights and a cotangent; NaN past the last group."""
    n, d, e, f = shape
    keys = jax.random.split(jax.random.key(0), 5)
    at_N1 = jnp.arange(n)[:, None]

    def random(key: jax.Array, *shape_: int) -> jax.Array:
        return jax.random.normal(key, shape_, jnp.float32).astype(dtype)

    rows_ND, dy_ND = (
        jnp.where(at_N1 < sizes_E.sum(), random(key, n, d), jnp.nan).astype(dtype)
        for key in keys[:2]
    )
    weights = experts.ExpertWeights(
        random(keys[2], e, f, d) * jnp.asarray(d**-0.5, dtype),
        random(keys[3], e, f, d) * jnp.asarray(d**-0.5, dtype),
        random(keys[4], e, d, f) * jnp.asarray(f**-0.5, dtype),
    )
    return rows_ND, jnp.asarray(sizes_E), weights, dy_ND


@jax.jit(static_argnames="run")
def _value_and_gradients(rows_ND, sizes_E, weights, dy_ND, *, run: experts.RunExperts):
    y_ND, transpose = jax.vjp(lambda x, w: run(x, sizes_E, w), rows_ND, weights)
    return y_ND, *transpose(dy_ND)


def _float32(array: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(jnp.float32) if is_float else array


def _errors(found: Any, expected: Any) -> dict[str, float]:
    """Largest difference by array, as a share of the largest magnitude there."""
    errors = {}
    for name, a, b in zip(ARRAYS, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = jnp.abs(b).max()
        errors[name] = float(jnp.abs(_float32(a) - b).max() / jnp.where(largest > 0, largest, 1))
    return errors


def _ordered(error: float) -> float:
    """The error, where NaN is the worst."""
    return error if np.isfinite(error) else np.inf


def _padding_is_zero(found: Any, n_rows: int) -> bool:
    y_ND, dx_ND, _ = found
    return bool((y_ND[n_rows:] == 0).all() & (dx_ND[n_rows:] == 0).all())
