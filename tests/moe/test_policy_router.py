"""REINFORCE: its probabilities and its gradient, against every possible choice of a toy problem."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.moe import report
from dsmoe_jax.moe.routers.policy import PolicySample, log_probability, policy_loss, sample_of
from dsmoe_jax.moe.types import RouterInputs
from tests.tools.routing import moe_config, route

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
        sample = PolicySample(log_prob_T[None, None], entropy_T[None, None])
        return policy_loss(sample, nll_T[None], mask_T[None], 0.7)

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
    config = moe_config("reinforce", e=E, k=K)
    many, tokens = jnp.tile(logits, (n, 1)), jnp.zeros(n, jnp.int32)
    drawn = route(many, RouterInputs(tokens, rng=jax.random.key(0)), config)
    for order in ORDERS:
        share = (np.asarray(drawn.ids_TK) == order).all(axis=1).mean()
        assert abs(share - probability(logits, order)) < 4 * np.sqrt(0.25 / n)
    best = route(many, RouterInputs(tokens), config)
    np.testing.assert_array_equal(best.ids_TK, np.tile([2, 0], (n, 1)))
    np.testing.assert_array_equal(best.gates_TK, 0.5)


def test_the_sample_is_read_off_the_routing():
    """Its probabilities and entropies, in plain numpy, from ids and logits alone."""
    logits = np.random.default_rng(2).normal(size=(50, E)).astype(np.float32)
    inputs = RouterInputs(jnp.zeros(50, jnp.int32), rng=jax.random.key(0))
    routing = route(jnp.asarray(logits), inputs, moe_config("reinforce", e=E, k=K))
    sample = sample_of(routing._replace(gates_TK=None, affinity_TE=None))
    want = [probability(u, order) for u, order in zip(logits, routing.ids_TK.tolist(), strict=True)]
    np.testing.assert_allclose(np.exp(sample.log_prob), want, rtol=1e-5)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sample.entropy, -(p * np.log(p)).sum(axis=1), rtol=1e-5)


def test_a_layer_hands_its_sample_to_the_loss_by_sequence():
    """A router that samples reports its sample; the others report none."""
    logits = np.random.default_rng(3).normal(size=(6, E)).astype(np.float32)
    inputs, valid_BS = RouterInputs(jnp.zeros(6, jnp.int32)), jnp.ones((2, 3), bool)
    policy, plain = moe_config("reinforce", e=E, k=K), moe_config("topk", e=E, k=K)
    routing = route(jnp.asarray(logits), inputs, policy)
    found = report.loss_inputs(routing, valid_BS, policy).policy
    wanted = PolicySample(*(x_T.reshape(2, 3) for x_T in sample_of(routing)))
    chex.assert_trees_all_equal(found, wanted)
    assert report.loss_inputs(routing, valid_BS, plain).policy is None
