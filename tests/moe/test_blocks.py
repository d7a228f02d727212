"""Experts in blocks: values, all gradients, and that no block without assignments is run.

Shapes: R rows, D hidden, W choices of a row, e experts, T tokens, E experts, K activated.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.moe import blocks, reference
from dsmoe_jax.moe.dispatch import Arrived
from dsmoe_jax.moe.experts import BACKENDS, ExpertWeights, JoinedWeights, join
from dsmoe_jax.moe.kernels import rows
from dsmoe_jax.moe.types import Routing

R, W, E, D, F = 40, 3, 4, 6, 5
NONE = E


def arrays(dtype=jnp.float32, d=D):
    rng = np.random.default_rng(0)
    shapes = ((R, d), (R, W), (E, F, d), (E, F, d), (E, d, F), (R, d))
    x, gates, *weights, dy = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    return x, gates.astype(jnp.float32), ExpertWeights(*weights), dy


def routing(chosen):
    """Choices of the first rows; the others, as those not received, have none."""
    ids = np.full((R, W), NONE)
    for row, choices in enumerate(chosen):
        ids[row, : len(choices)] = choices
    return ids


LOADS = {
    "one choice each": routing([[i % E] for i in range(R)]),
    "all choices": routing([[i % E, (i + 1) % E, (i + 2) % E] for i in range(R)]),
    "few rows, few with several": routing([[1], [2, 0], [3], [1, 2, 3], [0]]),
    "one expert takes all": routing([[2]] * 31),
    "nothing": routing([]),
    "gaps": np.where(np.arange(R)[:, None] % 3, NONE, routing([[3, 1]] * R)),
    "first choices missing": routing([[NONE, 1, NONE], [NONE, NONE, 2], [0]]),
}


@functools.partial(jax.jit, static_argnames=("backend", "usual"))
def in_blocks(ids, x, gates, weights, dy, backend="loop", usual=16):
    """Values, gradients, and the rows of each expert."""

    def run(x, gates, weights):
        expected = blocks.Usual(usual, R / 2, 5.0)
        arrived = Arrived(x, Routing(ids, gates, None))
        run_weighted = BACKENDS[backend].run_weighted
        return blocks.weighted_sums(run_weighted, arrived, join(weights), R * W, expected)

    y, transpose, computed = jax.vjp(run, x, gates, weights, has_aux=True)
    return y, transpose(dy), computed


def expected(ids, x, gates, weights, dy):
    def run(x, gates, weights):
        gates = jnp.where(ids < E, gates, 0.0)
        return reference.moe_layer(x, Routing(ids, gates, None), weights)

    y, transpose = jax.vjp(run, x, gates, weights)
    return y, transpose(dy), jnp.bincount(ids.reshape(-1), length=E + 1)[:E]


def assert_close(found, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["loop", "blocked", "ragged_dot"])
@pytest.mark.parametrize("loads", LOADS)
def test_blocks_are_the_dense_loop(loads, backend):
    """Blocks cut through experts, and the last one is partly empty."""
    ids = jnp.asarray(LOADS[loads], jnp.int32)
    assert_close(in_blocks(ids, *arrays(), backend=backend), expected(ids, *arrays()))


def test_rows_of_whole_tiles():
    """Wide rows are moved as tiles of a TPU, which changes no number."""
    ids = jnp.asarray(LOADS["all choices"], jnp.int32)
    x, gates, weights, dy = arrays(d=2048)
    wide = x, gates, jax.tree.map(lambda w: w / 50, weights), dy
    assert rows.as_tiles(x).shape == (R, 16, 128)
    assert_close(in_blocks(ids, *wide), expected(ids, *wide), 1e-4)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=25)
def test_any_routing(data):
    choice = st.permutations(range(E)).flatmap(
        lambda order: st.integers(0, W).map(lambda n: order[:n])
    )
    chosen = data.draw(st.lists(choice, max_size=R))
    usual = data.draw(st.sampled_from((3, 24, 1000)))
    ids = jnp.asarray(routing(chosen), jnp.int32)
    assert_close(in_blocks(ids, *arrays(), usual=usual), expected(ids, *arrays()))


def test_what_no_assignment_asks_for_is_not_read():
    """NaN in rows and gates without a choice, and in the room for rows that did not come."""
    ids = jnp.asarray(LOADS["few rows, few with several"], jnp.int32)
    x, gates, weights, dy = arrays()
    poisoned = x.at[5:].set(jnp.nan), jnp.where(ids < E, gates, jnp.nan), weights
    y, gradients, _ = in_blocks(ids, *poisoned, dy.at[5:].set(jnp.nan))
    wanted_y, wanted, _ = expected(ids, x, gates, weights, dy.at[5:].set(0))
    assert_close((y, gradients), (wanted_y, wanted))
    np.testing.assert_array_equal(y[5:], 0)
    np.testing.assert_array_equal(gradients[0][5:], 0)


def test_rows_that_did_not_come_are_not_passed_over():
    """Rows after the last that came are undefined: no sum is stored for them."""
    ids = jnp.asarray(LOADS["few rows, few with several"], jnp.int32)
    x, gates, weights, dy = arrays()

    def run(n_rows):
        arrived = Arrived(x, Routing(ids, gates, None), n_rows=jnp.int32(n_rows))
        usual = blocks.Usual(16, 5, 5.0)
        run_weighted = BACKENDS["loop"].run_weighted
        return blocks.weighted_sums(run_weighted, arrived, join(weights), R * W, usual)[0]

    trips = []
    real = jax.lax.fori_loop

    def counting(first, last, body, start):
        trips.append(int(last))
        return real(first, last, body, start)

    wanted, _, _ = expected(ids, x, gates, weights, dy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "fori_loop", counting)
        np.testing.assert_allclose(run(5)[:5], wanted[:5], rtol=2e-5, atol=2e-5)
        # 7 assignments in blocks of 9, 2 rows with several and 5 rows in blocks of 3.
        assert trips == [1, 1, 2]
        trips.clear()
        np.testing.assert_allclose(run(40), wanted, rtol=2e-5, atol=2e-5)
        assert trips == [1, 1, 14]


@pytest.mark.parametrize(("n", "runs"), [(0, 0), (1, 1), (9, 1), (10, 2), (40, 5)])
def test_as_many_blocks_run_as_have_assignments(n, runs):
    counted = []

    def run(rows_BD, gates_B, sizes_e, weights):
        del sizes_e
        jax.debug.callback(lambda: counted.append(len(rows_BD)))
        return rows_BD * gates_B[:, None] * weights.gate_up_EGD[0, 0]

    x, gates, weights, dy = arrays()
    ids = jnp.asarray(routing([[i % E] for i in range(n)]), jnp.int32)

    def total(x):
        usual = blocks.Usual(16, R, 5.0)
        arrived = Arrived(x, Routing(ids, gates, None))
        return blocks.weighted_sums(run, arrived, join(weights), R * W, usual)[0]

    _, transpose = jax.vjp(total, x)
    jax.effects_barrier()
    assert counted == [9] * runs
    transpose(dy)
    jax.effects_barrier()
    assert counted == [9] * 2 * runs


def test_sums_over_blocks_keep_what_bfloat16_would_lose():
    """400 rows, each with a gradient of 1: bfloat16 counts one by one to 256 only."""

    def run(rows_BD, gates_B, sizes_e, weights):
        del gates_B, sizes_e
        return rows_BD * weights.gate_up_EGD[0, 0, 0]

    ones = jnp.ones((400, 1), jnp.bfloat16)
    weights = JoinedWeights(jnp.ones((1, 2, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16))
    at = Routing(jnp.zeros((400, 1), jnp.int32), jnp.ones((400, 1)), None)

    def total(weights):
        usual = blocks.Usual(2, 400, 0.0)
        return blocks.weighted_sums(run, Arrived(ones, at), weights, 400, usual)[0]

    _, transpose = jax.vjp(total, weights)
    (gradients,) = transpose(ones)
    assert gradients.gate_up_EGD.dtype == jnp.bfloat16
    assert gradients.gate_up_EGD[0, 0, 0] == 400


@pytest.mark.parametrize(("n_experts", "n_devices", "k"), [(64, 8, 6), (8, 8, 3), (16, 1, 2)])
def test_expectations_are_those_of_random_choices(n_experts, n_devices, k):
    rng = np.random.default_rng(0)
    t = 4000
    ids = np.argsort(rng.random((n_devices * t, n_experts)), axis=1)[:, :k]
    here = (ids < n_experts // n_devices).sum(axis=1)
    found = blocks.usual(t, k, n_experts, n_devices)
    assert found.assignments == pytest.approx(here.sum(), rel=0.03)
    assert found.received == pytest.approx((here > 0).sum(), rel=0.03)
    assert found.several == pytest.approx((here > 1).sum(), rel=0.05, abs=1e-6)
