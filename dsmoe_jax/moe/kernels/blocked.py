"""The expert backend that is fast on CPU: little padding, pure JAX, its own gradients.

XLA needs static shapes, routing gives dynamic loads. So there is a short ladder of window heights;
each expert is computed in the lowest window that covers its rows, and all experts of one height
run in one loop with a dynamic trip count. Gains on CPU (measured, benchmarks/README.md):
a few per cent of padding instead of 70, each weight picked once (a dynamic slice is a copy), each
weight gradient written once. An expert above the highest window takes several of them, so any
imbalance is computed exactly and memory does not depend on the imbalance.

Shape suffixes: N rows sorted by expert, D hidden, F expert width, E experts, C rows of a window.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dsmoe_jax.nn.feed_forward import SWIGLU, Activation
from dsmoe_jax.nn.quantisation import times


def run(
    rows_ND: jax.Array,
    group_sizes_E: jax.Array,
    weights,
    activation: Activation = SWIGLU.activation,
) -> jax.Array:
    """The backend of this file, see `experts`; `weights` is an `ExpertWeights`."""
    return _run(activation, rows_ND, group_sizes_E, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(activation, rows_ND, group_sizes_E, weights):
    return _forward(activation, rows_ND, group_sizes_E, weights, save=False)[0]


def _forward(activation, rows_ND, group_sizes_E, weights, save=True):
    """The output and the values saved for the gradient; `save` adds the two projections."""

    def visit(expert, windows, carry):
        w = _pick(weights, expert)

        def one_window(i, carry):
            at, mine_C1 = windows.locate(i)
            x_CD = _read(rows_ND, at, mine_C1)
            gate_CF = _plus(times(x_CD, w.gate_EFD), w.gate_bias_EF).astype(x_CD.dtype)
            up_CF = _plus(times(x_CD, w.up_EFD), w.up_bias_EF).astype(x_CD.dtype)
            hidden_CF = _activate(activation, gate_CF, up_CF)
            y_CD = _plus(times(hidden_CF, w.down_EDF), w.down_bias_ED)
            new = (y_CD.astype(x_CD.dtype), gate_CF, up_CF)[: len(carry)]
            return tuple(_write(o, v, at, mine_C1) for o, v in zip(carry, new, strict=True))

        return windows.each(one_window, carry)

    n = rows_ND.shape[0]
    f = weights.gate_EFD.shape[1]
    dtype = rows_ND.dtype
    # Different fill values for equal shapes: XLA would make one constant and then copy it.
    init = (jnp.zeros_like(rows_ND), jnp.zeros((n, f), dtype), jnp.ones((n, f), dtype))
    out_ND, *projections = _for_each_expert(group_sizes_E, n, visit, init[: 3 if save else 1])
    return out_ND, (rows_ND, group_sizes_E, weights, *projections)


def _backward(activation, saved, d_out_ND):
    rows_ND, group_sizes_E, weights, gate_NF, up_NF = saved

    def visit(expert, windows, carry):
        d_rows_ND, d_weights = carry
        w = _pick(weights, expert)

        def one_window(i, d_rows_ND):
            at, mine_C1 = windows.locate(i)
            # Rows of other experts and padding (maybe NaN) must not reach a weight gradient.
            x_CD, dy_CD, gate_CF, up_CF = (
                _read(a, at, mine_C1) for a in (rows_ND, d_out_ND, gate_NF, up_NF)
            )
            hidden_CF, transpose = jax.vjp(partial(_activate, activation), gate_CF, up_CF)
            dgate_CF, dup_CF = transpose(_matmul("co,oi->ci", dy_CD, w.down_EDF).astype(x_CD.dtype))
            d_w = type(weights)(
                _matmul("co,ci->oi", dgate_CF, x_CD),
                _matmul("co,ci->oi", dup_CF, x_CD),
                _matmul("co,ci->oi", dy_CD, hidden_CF),
                *(
                    None if bias is None else d_CO.sum(axis=0, dtype=jnp.float32)
                    for bias, d_CO in zip(w[3:], (dgate_CF, dup_CF, dy_CD), strict=True)
                ),
            )
            dx_CD = _matmul("co,oi->ci", dgate_CF, w.gate_EFD)
            dx_CD += _matmul("co,oi->ci", dup_CF, w.up_EFD)
            return _write(d_rows_ND, dx_CD.astype(x_CD.dtype), at, mine_C1), d_w

        d_rows_ND, d_w = windows.each_with_sum(one_window, d_rows_ND)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=expert, axis=0)
        return d_rows_ND, jax.tree.map(lambda a, b: put(a, b.astype(a.dtype)), d_weights, d_w)

    # Every expert is visited, an empty one too, so the fill values are never seen.
    d_weights = type(weights)(
        *(None if w is None else jnp.full_like(w, i) for i, w in enumerate(weights))
    )
    init = (jnp.zeros_like(rows_ND), d_weights)
    d_rows_ND, d_weights = _for_each_expert(group_sizes_E, rows_ND.shape[0], visit, init)
    return d_rows_ND, None, d_weights


_run.defvjp(_forward, _backward)


class _Windows:
    """The rows [start, end) of one expert, cut into windows of a static height.

    Args:
      several: False promises that one window covers the rows, and spares the loop.
    """

    def __init__(self, start, end, height: int, n_rows: int, several: bool):
        self.start, self.end, self.height, self.n_rows = start, end, height, n_rows
        self.several = several

    def locate(self, i):
        """First row of window i, and which of its rows are this expert's: (C, 1)."""
        start = self.start + i * self.height
        # A window that would pass the last row is shifted back: a dynamic slice would do so too.
        at = jnp.maximum(0, jnp.minimum(start, self.n_rows - self.height))
        row_C = at + jnp.arange(self.height)
        return at, ((row_C >= start) & (row_C < self.end))[:, None]

    def each(self, one_window: Callable, carry):
        """Folds `one_window(i, carry) -> carry` over the windows."""
        if not self.several:
            return one_window(0, carry)
        n_windows = (self.end - self.start + self.height - 1) // self.height
        return jax.lax.fori_loop(0, n_windows, one_window, carry)

    def each_with_sum(self, one_window: Callable, carry):
        """Folds `one_window(i, carry) -> carry, term`; returns the sum of the terms too."""
        if not self.several:
            return one_window(0, carry)
        _, term = jax.eval_shape(one_window, 0, carry)

        def add(i, carry_and_sum):
            carry, term = one_window(i, carry_and_sum[0])
            return carry, jax.tree.map(jnp.add, carry_and_sum[1], term)

        zero = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), term)
        return self.each(add, (carry, zero))


def _for_each_expert(group_sizes_E, n_rows: int, visit: Callable, carry):
    """Folds `visit(expert, windows, carry) -> carry` over all experts, one loop a window height."""
    ends_E = jnp.cumsum(group_sizes_E)
    starts_E = ends_E - group_sizes_E
    heights = window_heights(n_rows, group_sizes_E.shape[0])
    # Rung of the ladder of each expert; len(heights) for those that need several windows.
    rung_E = jnp.searchsorted(jnp.asarray(heights), group_sizes_E, method="compare_all")
    order_E = jnp.argsort(rung_E, stable=True)
    n_below = (rung_E[:, None] < jnp.arange(len(heights) + 2)).sum(axis=0)
    for rung in range(len(heights) + (heights[-1] < n_rows)):
        height = heights[min(rung, len(heights) - 1)]
        several = rung == len(heights)

        def body(i, carry, height=height, several=several):
            expert = order_E[i]
            windows = _Windows(starts_E[expert], ends_E[expert], height, n_rows, several)
            return visit(expert, windows, carry)

        carry = jax.lax.fori_loop(n_below[rung], n_below[rung + 1], body, carry)
    return carry


def window_heights(n_rows: int, n_experts: int) -> list[int]:
    """The ladder: ascending static window heights, none above n_rows.

    Powers of two up to a third of the mean load, then steps of an eighth (of 8 rows at least) up to
    twice the mean. Every rung is compiled: more of them compile longer, fewer pad more.
    """
    mean = -(-n_rows // n_experts)
    heights = [8]
    while heights[-1] < 2 * mean:
        last = heights[-1]
        heights.append(2 * last if 3 * last < mean else last + max(8, last // 64 * 8))
    return [h for h in heights if h < n_rows] or [n_rows]


def _activate(activation, gate_CF, up_CF):
    wide_gate_CF = gate_CF.astype(jnp.float32)
    wide_up_CF = up_CF.astype(jnp.float32)
    return activation.hidden(wide_gate_CF, wide_up_CF).astype(gate_CF.dtype)


def _plus(y_CO, bias_O):
    return y_CO if bias_O is None else y_CO + bias_O.astype(y_CO.dtype)


_matmul = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _pick(weights, expert):
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, 0, False), weights)


def _read(array_NX, at, mine_C1):
    window_CX = jax.lax.dynamic_slice_in_dim(array_NX, at, mine_C1.shape[0])
    return jnp.where(mine_C1, window_CX, 0)


def _write(array_NX, window_CX, at, mine_C1):
    before_CX = jax.lax.dynamic_slice_in_dim(array_NX, at, mine_C1.shape[0])
    window_CX = jnp.where(mine_C1, window_CX, before_CX)
    return jax.lax.dynamic_update_slice_in_dim(array_NX, window_CX, at, 0)
