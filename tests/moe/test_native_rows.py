"""The compiled row operations and top-k against those in pure JAX: values, gradients, ties."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.moe.dispatch import local
from dsmoe_jax.moe.kernels import JAX_ROWS, ROW_KERNELS
from dsmoe_jax.moe.kernels.native import rows
from dsmoe_jax.moe.kernels.rows import group
from dsmoe_jax.moe.types import Routing


def bits(array):
    return np.asarray(array).view(np.int32)


def awkward(rng, *shape):
    """Few different numbers, so many ties; both zeros, infinities and NaN of both signs."""
    x = rng.integers(-3, 4, shape).astype(np.float32)
    for value in (-0.0, np.inf, -np.inf, np.nan, -np.float32(np.nan)):
        x[rng.random(shape) < 0.07] = value
    return x


@pytest.mark.parametrize(("t", "e", "k"), [(600, 63, 7), (5, 3, 3), (9, 1, 1), (8, 40, 11)])
def test_top_k_is_that_of_jax_bit_for_bit(t, e, k):
    x_TE = awkward(np.random.default_rng(0), t, e)
    found, expected = rows.top_k(jnp.asarray(x_TE), k), jax.lax.top_k(x_TE, k)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(bits(found[0]), bits(expected[0]))


def test_gradient_of_top_k():
    rng = np.random.default_rng(1)
    x_TE, dy_TK = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((30, 9), (30, 4)))

    def gradient(top_k):
        return jax.grad(lambda x: (top_k(x, 4)[0] * dy_TK).sum())(x_TE)

    np.testing.assert_array_equal(gradient(rows.top_k), gradient(jax.lax.top_k))


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 600), st.integers(1, 70))
def test_group_is_that_of_jax(seed, t, n_groups):
    k = min(3, n_groups)
    ids_TK = np.random.default_rng(seed).integers(0, n_groups + 1, (t, k)).astype(np.int32)
    found, expected = rows.group(jnp.asarray(ids_TK), n_groups), group(ids_TK, n_groups)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ids_out_of_range_are_unassigned():
    ids_TK = jnp.asarray([[0, -1], [7, 1]], jnp.int32)
    order_N, rank_TK, sizes_E = rows.group(ids_TK, 2)
    assert order_N.tolist() == [0, 3, 1, 2]
    assert rank_TK.tolist() == [[0, 2], [3, 1]]
    assert sizes_E.tolist() == [1, 1]


@pytest.mark.parametrize(("t", "d"), [(600, 48), (37, 13), (3, 8), (1, 1)])
def test_local_dispatch_is_that_of_jax(t, d):
    e, k = 6, 3
    rng = np.random.default_rng(2)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    ids_TK = np.argsort(rng.random((t, e + 1)), axis=1)[:, :k].astype(np.int32)  # e: unassigned
    x_TD, dy_TD, gates_TK, scale_N1 = normal(t, d), normal(t, d), normal(t, k), normal(t * k, 1)

    def run(x_TD, gates_TK, kernels):
        routing = Routing(jnp.asarray(ids_TK), gates_TK, None)
        there = local.dispatch(x_TD, routing, e, kernels)
        mine_N1 = (jnp.arange(t * k) < there.group_sizes_e.sum())[:, None]
        out_ND = jnp.where(mine_N1, there.rows_ND * scale_N1, 0)
        return local.combine(out_ND, there.state, kernels), there.computed()

    results = []
    for kernels in (ROW_KERNELS["native"], JAX_ROWS):
        y_TD, transpose, computed_E = jax.vjp(
            lambda x, g, kernels=kernels: run(x, g, kernels), x_TD, gates_TK, has_aux=True
        )
        results.append((y_TD, *transpose(dy_TD), computed_E))
        np.testing.assert_array_equal(kernels.count(ids_TK, e), computed_E)
    chex.assert_trees_all_equal_dtypes(*results)
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5)
