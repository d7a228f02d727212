"""Sinkhorn and expert choice against plain numpy, BASE against SciPy's linear assignment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dsmoe_jax.moe.routers import assignment, balanced
from dsmoe_jax.moe.types import RouterInputs, count_load
from tests.tools.routing import moe_config, route

T, E = 64, 8
TOKENS = jnp.zeros(T, jnp.int32)


def skewed_logits(seed=0):
    """All tokens like the first experts best."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(T, E)) + np.linspace(3, 0, E)).astype(np.float32)


def maxvio(ids_TK, valid_T=None):
    load_E = count_load(ids_TK, E, valid_T)
    return float(load_E.max() / load_E.mean() - 1)


def test_sinkhorn_shares_are_fair():
    logits = skewed_logits()
    x = np.exp(logits.astype(np.float64))
    for _ in range(30):
        x = x / x.sum(axis=0, keepdims=True)
        x = x / x.sum(axis=1, keepdims=True)
    got = np.exp(balanced.balance(jnp.asarray(logits), None, iterations=30))
    np.testing.assert_allclose(got, x, rtol=1e-3)
    np.testing.assert_allclose(got.sum(axis=0), T / E, rtol=1e-2)


def test_sinkhorn_takes_as_many_iterations_as_its_option_says():
    """None leave the logits as they are, one is not enough; the default is eight."""
    logits, inputs = skewed_logits(), RouterInputs(TOKENS, rng=jax.random.key(0))
    ids = [
        route(logits, inputs, moe_config("sinkhorn", options=options)).ids_TK
        for options in ({"iterations": 0}, {"iterations": 1}, {"iterations": 8}, {})
    ]
    assert maxvio(ids[0]) > 1.0 > maxvio(ids[1]) > maxvio(ids[2])
    np.testing.assert_array_equal(ids[2], ids[3])


def test_sinkhorn_evens_the_load_in_training_and_not_in_evaluation():
    logits, config = skewed_logits(), moe_config("sinkhorn")
    trained = route(logits, RouterInputs(TOKENS, rng=jax.random.key(0)), config)
    evaluated = route(logits, RouterInputs(TOKENS), config)
    plain = route(logits, RouterInputs(TOKENS), moe_config())
    np.testing.assert_array_equal(evaluated.ids_TK, plain.ids_TK)
    assert maxvio(plain.ids_TK) > 1.0
    assert maxvio(trained.ids_TK) < 0.5
    s = np.asarray(plain.affinity_TE)
    want = np.take_along_axis(s, np.asarray(trained.ids_TK), axis=1)
    np.testing.assert_allclose(trained.gates_TK, want, rtol=1e-5)  # the plain scores weigh


def test_padding_does_not_take_part_in_sinkhorn():
    logits, config = skewed_logits(), moe_config("sinkhorn")
    padded = np.concatenate([logits, np.full((T, E), 7.0) * np.arange(E)]).astype(np.float32)
    valid = jnp.arange(2 * T) < T
    got = balanced.balance(jnp.asarray(padded), valid, 8)[:T]
    want = balanced.balance(jnp.asarray(logits), None, 8)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    inputs = RouterInputs(TOKENS, rng=jax.random.key(0))
    more = inputs._replace(token_ids_T=jnp.zeros(2 * T, jnp.int32), valid_T=valid)
    got, want = route(padded, more, config), route(logits, inputs, config)
    np.testing.assert_array_equal(got.ids_TK[:T], want.ids_TK)


def numpy_expert_choice(s, capacity, valid):
    """2202.09368 section 3.2: each expert's best tokens, as a dense matrix of gates."""
    gates = np.zeros_like(s)
    for i in range(s.shape[1]):
        order = [t for t in np.argsort(-s[:, i], kind="stable") if valid[t]][:capacity]
        gates[order, i] = s[order, i]
    return gates


@pytest.mark.parametrize("n_valid", [T - 3, T - 10, 10])
def test_expert_choice(n_valid):
    t = T - 3
    capacity = -(-n_valid * 2 // E)  # 61 K / E = 15.25, rounded up
    logits = skewed_logits(1)[:t]
    valid = np.random.default_rng(0).permutation(t) < n_valid
    config = moe_config("expert_choice")
    routing = route(logits, RouterInputs(TOKENS[:t], jnp.asarray(valid)), config)
    s = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    dense = np.zeros((t, E + 1), np.float32)
    np.put_along_axis(dense, np.asarray(routing.ids_TK), np.asarray(routing.gates_TK), axis=1)
    want = numpy_expert_choice(s, capacity, valid)
    np.testing.assert_allclose(dense[:, :E], want, rtol=1e-5)
    np.testing.assert_array_equal(dense[:, E], 0.0)
    load_E = count_load(routing.ids_TK, E)
    np.testing.assert_array_equal(load_E, np.full(E, capacity))
    assert (np.diff(np.asarray(routing.gates_TK), axis=1) <= 0).all(), "best first"


def test_expert_choice_by_sigmoids_that_saturate():
    """Each expert takes the tokens with the largest logits, not the first of those at 1."""
    logits = 20 + 5 * skewed_logits(4)
    routing = route(
        logits, RouterInputs(TOKENS), moe_config("expert_choice", scoring_func="sigmoid")
    )
    taken = np.zeros((T, E + 1), bool)
    np.put_along_axis(taken, np.asarray(routing.ids_TK), True, axis=1)
    for i in range(E):
        best = np.argsort(-logits[:, i], kind="stable")[: 2 * T // E]
        np.testing.assert_array_equal(np.flatnonzero(taken[:, i]), np.sort(best))


def test_expert_choice_leaks_the_future():
    """A later token changes who serves an earlier one: what its docstring warns of."""
    logits, config = skewed_logits(1), moe_config("expert_choice")
    later = logits.copy()
    later[T // 2 :] += 9.0 * (np.arange(E) == 0)
    a, b = (route(x, RouterInputs(TOKENS), config).gates_TK[: T // 2] for x in (logits, later))
    assert jnp.abs(a - b).max() > 0.01
    plain = moe_config()
    a, b = (route(x, RouterInputs(TOKENS), plain).gates_TK[: T // 2] for x in (logits, later))
    np.testing.assert_array_equal(a, b)


assign = jax.jit(assignment.assign)


def largest_total(affinity, places):
    """The best total when every expert has that many places."""
    by_place = np.repeat(affinity.astype(np.float64), places, axis=1)
    return by_place[linear_sum_assignment(by_place, maximize=True)].sum()


@pytest.mark.parametrize("kind", ["random", "skewed", "alike", "whole"])
@pytest.mark.parametrize("n_valid", [T, T - 11])
def test_base_assignment_is_the_best_balanced_one(kind, n_valid):
    """2103.16716 eqs. 2-3; `alike`: all tokens nearly the same, which is the most to be moved."""
    rng = np.random.default_rng(3)
    affinity = {
        "random": rng.normal(size=(T, E)),
        "skewed": skewed_logits(2),
        "alike": rng.normal(size=E) + 1e-3 * rng.normal(size=(T, E)),
        "whole": rng.integers(-3, 4, size=(T, E)),  # many ties
    }[kind].astype(np.float32)
    valid = rng.permutation(T) < n_valid
    ids = np.asarray(assign(jnp.asarray(affinity), jnp.asarray(valid)))
    places = -(-n_valid // E)
    assert np.bincount(ids[valid], minlength=E).max() <= places
    total = affinity[np.arange(T), ids][valid].sum(dtype=np.float64)
    assert total == pytest.approx(largest_total(affinity[valid], places), abs=1e-5)
    np.testing.assert_array_equal(ids[~valid], affinity[~valid].argmax(axis=1))


def test_base_assignment_is_the_best_whatever_the_first_prices(monkeypatch):
    """From 0 every token begins at its favourite: dozens of chains instead of a few."""
    monkeypatch.setattr(assignment, "_first_prices", lambda worth_NE, _: jnp.zeros(E))
    for seed in range(3):
        affinity = skewed_logits(seed)
        ids = np.asarray(jax.jit(lambda a: assignment.assign(a))(affinity))
        total = affinity[np.arange(T), ids].sum(dtype=np.float64)
        assert total == pytest.approx(largest_total(affinity, T // E), abs=1e-5)


def test_base_balances_exactly_in_training_and_is_greedy_in_evaluation():
    logits = skewed_logits()
    config = moe_config("base", k=1)
    trained = route(logits, RouterInputs(TOKENS, rng=jax.random.key(0)), config)
    np.testing.assert_array_equal(count_load(trained.ids_TK, E), np.full(E, T / E))
    half = RouterInputs(TOKENS, jnp.arange(T) < T // 2, jax.random.key(0))
    padded = route(logits, half, config).ids_TK[: T // 2]
    np.testing.assert_array_equal(count_load(padded, E), np.full(E, T / 2 / E))
    evaluated = route(logits, RouterInputs(TOKENS), config)
    np.testing.assert_array_equal(evaluated.ids_TK[:, 0], logits.argmax(axis=1))
    for routing in (trained, evaluated):
        chosen = np.take_along_axis(logits, np.asarray(routing.ids_TK), axis=1)
        np.testing.assert_allclose(routing.gates_TK, 1 / (1 + np.exp(-chosen)), rtol=1e-5)


@pytest.mark.parametrize("offset", [np.nan, np.inf, 1e6])
def test_base_ends_whatever_the_affinities(offset):
    """One that is no number, or a spread below the rounding of the numbers, must not hang a run."""
    affinity = (1e-3 * skewed_logits()).astype(np.float32) + np.float32(offset)
    affinity[0, 0] = 3.0
    ids = assign(jnp.asarray(affinity))
    np.testing.assert_array_equal(np.bincount(ids, minlength=E), T // E)
