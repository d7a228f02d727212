"""The compiled row operations and top-k against those in pure JAX: values, gradients, ties."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.moe.dispatch.local import group, local
from dsmoe_jax.moe.kernels.native import rows
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
    gradient = lambda top_k: jax.grad(lambda x: (top_k(x, 4)[0] * dy_TK).sum())(x_TE)  # noqa: E731
    np.testing.assert_array_equal(gradient(rows.top_k), gradient(jax.lax.top_k))


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 600), st.integers(1, 70))
def test_group_is_that_of_jax(seed, t, n_groups):
    k = min(3, n_groups)
    ids_TK = np.random.default_rng(seed).integers(0, n_groups + 1, (t, k)).astype(np.int32)
    found, expected = rows.group(jnp.asarray(ids_TK), n_groups), group(ids_TK, n_groups)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ids_out_of_range_go_to_nobody():
    ids_TK = jnp.asarray([[0, -1], [7, 1]], jnp.int32)
    order_N, rank_TK, sizes_E = rows.group(ids_TK, 2)
    assert order_N.tolist() == [0, 3, 1, 2]
    assert rank_TK.tolist() == [[0, 2], [3, 1]]
    assert sizes_E.tolist() == [1, 1]


@pytest.mark.parametrize(("t", "d"), [(600, 48), (37, 13), (3, 8), (1, 1)])
def test_local_dispatch_is_that_of_jax(t, d):
    e, k, rng = 6, 3, np.random.default_rng(2)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    ids_TK = np.argsort(rng.random((t, e + 1)), axis=1)[:, :k].astype(np.int32)  # e: nobody
    x_TD, dy_TD, gates_TK, scale_N1 = normal(t, d), normal(t, d), normal(t, k), normal(t * k, 1)

    def run(x_TD, gates_TK, compiled):
        def run_experts(rows_ND, sizes_E):
            mine_N1 = (jnp.arange(t * k) < sizes_E.sum())[:, None]
            return jnp.where(mine_N1, rows_ND * scale_N1, 0)

        routing = Routing(jnp.asarray(ids_TK), gates_TK, None)
        return local(x_TD, routing, e, run_experts, compiled=compiled)

    results = []
    for compiled in (True, False):
        y_TD, transpose, computed_E = jax.vjp(
            lambda x, g, compiled=compiled: run(x, g, compiled), x_TD, gates_TK, has_aux=True
        )
        results.append((y_TD, *transpose(dy_TD), computed_E))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
