"""REINFORCE: its probabilities and its gradient, against every possible choice of a toy problem."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.moe.routers.policy import log_probability, policy_loss
from dsmoe_jax.moe.types import Drawn, RouterInputs

T, E, K, D = 3, 3, 2, 4
ORDERS = np.array(list(itertools.permutations(range(E), K)), np.int32)  # all choices of a token
JOINT = np.array(list(itertools.product(range(len(ORDERS)), repeat=T)))  # of all tokens together


def probability(logits, order):
    """Drawn one after the other, in plain Python."""
    left, p = dict(enumerate(np.exp(np.asarray(logits, np.float64)))), 1.0
    for i in order:
        p *= left[i] / sum(left.values())
        del left[i]
    return p


def test_log_probability_is_that_of_drawing_without_replacement():
    logits = np.random.default_rng(0).normal(size=(len(ORDERS), E)).astype(np.float32)
    logits[:] = logits[0]
    got = np.exp(log_probability(jnp.asarray(logits), jnp.asarray(ORDERS)))
    np.testing.assert_allclose(got, [probability(logits[0], o) for o in ORDERS], rtol=1e-5)
    np.testing.assert_allclose(got.sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("masked", [(), (1,)])
def test_the_expectation_of_the_estimate_is_the_gradient(masked):
    """Each token's loss is a table by its own choice: both sides are sums over all choices."""
    rng = np.random.default_rng(1)
    x_TD = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    w_ED = jnp.asarray(rng.normal(size=(E, D)), jnp.float32)
    mask_T = jnp.ones(T).at[jnp.array(masked, int)].set(0.0)
    nll_TC = jnp.asarray(rng.uniform(0, 5, (T, len(ORDERS))), jnp.float32) * mask_T[:, None]

    def probabilities(w_ED):  # of each of the C choices of each token
        by_order = [
            log_probability(x_TD @ w_ED.T, jnp.broadcast_to(order, (T, K))) for order in ORDERS
        ]
        return jnp.exp(jnp.stack(by_order, axis=1))

    def estimate(w_ED, choice_T):
        log_prob_T = log_probability(x_TD @ w_ED.T, jnp.asarray(ORDERS)[choice_T])
        nll_T = nll_TC[jnp.arange(T), choice_T]
        entropy_T = jnp.log(3.0) - relative_entropy(w_ED)
        drawn = Drawn(log_prob_T[None, None], entropy_T[None, None])
        return policy_loss(drawn, nll_T[None], mask_T[None], 0.7)

    def relative_entropy(w_ED):  # to the uniform policy
        p_TE = jax.nn.softmax(x_TD @ w_ED.T)
        return (p_TE * jnp.log(E * p_TE)).sum(axis=1)

    def expected(w_ED):
        bonus = 0.7 * (mask_T * (jnp.log(3.0) - relative_entropy(w_ED))).sum()
        return (probabilities(w_ED) * nll_TC).sum() - bonus

    want = jax.grad(expected)(w_ED)
    grads = jax.vmap(jax.grad(estimate), (None, 0))(w_ED, jnp.asarray(JOINT))
    chance = probabilities(w_ED)[jnp.arange(T), JOINT].prod(axis=1)
    got = jnp.einsum("j,jed->ed", chance, grads)
    assert jnp.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_draws_from_the_policy_in_training_and_takes_the_best_in_evaluation():
    n, logits = 20_000, np.array([1.0, 0.0, 2.0], np.float32)
    config = MoEConfig(n_routed_experts=E, num_experts_per_tok=K, router="reinforce")
    many, tokens = jnp.tile(logits, (n, 1)), jnp.zeros(n, jnp.int32)
    drawn = get_router(config).route(many, RouterInputs(tokens, rng=jax.random.key(0)), config)
    for order in ORDERS:
        share = (np.asarray(drawn.ids_TK) == order).all(axis=1).mean()
        assert abs(share - probability(logits, order)) < 4 * np.sqrt(0.25 / n)
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(drawn.drawn_T.entropy, -(p * np.log(p)).sum(), rtol=1e-5)
    best = get_router(config).route(many, RouterInputs(tokens), config)
    np.testing.assert_array_equal(best.ids_TK, np.tile([2, 0], (n, 1)))
    np.testing.assert_array_equal(best.gates_TK, 0.5)
