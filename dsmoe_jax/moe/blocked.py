"""The expert backend that is fast on CPU: exact work in pure JAX, with its own gradients.

A loop over experts picks each weight once (a dynamic slice is a copy on CPU) and walks over the
expert's rows in windows of BLOCK rows. Any imbalance is correct; padding costs at most one
window an expert.

Shape suffixes: N rows sorted by expert, D hidden, F expert width, E experts, C rows of a window.
"""

from functools import partial

import jax
import jax.numpy as jnp

BLOCK = 128


@jax.custom_vjp
def run(rows_ND: jax.Array, group_sizes_E: jax.Array, weights) -> jax.Array:
    """See `experts.run_experts`; `weights` is an `ExpertWeights`."""
    return _forward(rows_ND, group_sizes_E, weights)[0]


def _forward(rows_ND, group_sizes_E, weights):
    def one_expert(out_ND, expert):
        w, start, end = expert

        def one_window(i, out_ND):
            at, mine_C1 = _window(start + i * BLOCK, end, rows_ND.shape[0])
            x_CD = _rows(rows_ND, at)
            y_CD = _swiglu(x_CD, w)
            return _put(out_ND, jnp.where(mine_C1, y_CD, _rows(out_ND, at)), at)

        return jax.lax.fori_loop(0, _n_windows(start, end), one_window, out_ND), None

    bounds = _bounds(group_sizes_E)
    out_ND, _ = jax.lax.scan(one_expert, jnp.zeros_like(rows_ND), (weights, *bounds))
    return out_ND, (rows_ND, group_sizes_E, weights)


def _backward(saved, d_out_ND):
    rows_ND, group_sizes_E, weights = saved

    def one_expert(d_rows_ND, expert):
        w, start, end = expert

        def one_window(i, carry):
            d_rows_ND, d_w = carry
            at, mine_C1 = _window(start + i * BLOCK, end, rows_ND.shape[0])
            # Rows of other experts and padding (maybe NaN) must not reach a weight gradient.
            x_CD = jnp.where(mine_C1, _rows(rows_ND, at), 0)
            dy_CD = jnp.where(mine_C1, _rows(d_out_ND, at), 0)
            dx_CD, d_w_window = jax.vjp(_swiglu, x_CD, w)[1](dy_CD)
            dx_CD = jnp.where(mine_C1, dx_CD, _rows(d_rows_ND, at))
            d_w = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_w, d_w_window)
            return _put(d_rows_ND, dx_CD, at), d_w

        d_w = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), w)
        d_rows_ND, d_w = jax.lax.fori_loop(0, _n_windows(start, end), one_window, (d_rows_ND, d_w))
        return d_rows_ND, jax.tree.map(lambda a, b: a.astype(b.dtype), d_w, w)

    bounds = _bounds(group_sizes_E)
    d_rows_ND, d_weights = jax.lax.scan(one_expert, jnp.zeros_like(rows_ND), (weights, *bounds))
    return d_rows_ND, None, d_weights


run.defvjp(_forward, _backward)


def _swiglu(x_CD, w):
    matmul = partial(jnp.einsum, "ci,oi->co", preferred_element_type=jnp.float32)
    hidden_CF = jax.nn.silu(matmul(x_CD, w.gate_EFD)) * matmul(x_CD, w.up_EFD)
    return matmul(hidden_CF.astype(x_CD.dtype), w.down_EDF).astype(x_CD.dtype)


def _bounds(group_sizes_E):
    ends_E = jnp.cumsum(group_sizes_E)
    return ends_E - group_sizes_E, ends_E


def _n_windows(start, end):
    return (end - start + BLOCK - 1) // BLOCK


def _window(start, end, n_rows):
    """Where a window is read, shifted back where it would pass the last row, and its own rows."""
    at = jnp.maximum(0, jnp.minimum(start, n_rows - BLOCK))
    row_C = at + jnp.arange(min(BLOCK, n_rows))
    return at, ((row_C >= start) & (row_C < end))[:, None]


def _rows(array_ND, at):
    return jax.lax.dynamic_slice_in_dim(array_ND, at, min(BLOCK, array_ND.shape[0]))


def _put(array_ND, window_CD, at):
    return jax.lax.dynamic_update_slice_in_dim(array_ND, window_CD, at, 0)
