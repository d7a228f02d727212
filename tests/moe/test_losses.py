"""Balance terms against plain numpy written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.types import Routing

B, S, E, K = 3, 8, 6, 2


def random_case(seed, scale=2.0):
    logits = np.random.default_rng(seed).normal(size=(B * S, E), scale=scale).astype(np.float32)
    return logits, jnp.ones((B, S), bool)


def route(logits_TE):
    affinity = jax.nn.softmax(logits_TE, axis=-1)
    gates, ids = jax.lax.top_k(affinity, K)
    return Routing(ids, gates, affinity)


def numpy_expert_balance(s, ids):
    """V1 eqs. 12-14 for the tokens of one scope: s of (T', E), ids of (T', K)."""
    t = len(s)
    f = np.array([E / (K * t) * np.sum(np.any(ids == i, axis=1)) for i in range(E)])
    return np.sum(f * s.mean(axis=0))


@pytest.mark.parametrize("seed", range(3))
def test_expert_balance_by_scope(seed):
    logits, valid = random_case(seed)
    routing = route(logits)
    s, ids = np.asarray(routing.affinity_TE, np.float64), np.asarray(routing.ids_TK)
    whole = numpy_expert_balance(s, ids)
    each = [
        numpy_expert_balance(s[b * S : (b + 1) * S], ids[b * S : (b + 1) * S]) for b in range(B)
    ]
    np.testing.assert_allclose(
        losses.expert_balance(logits, routing, valid, "global_batch"), whole, rtol=1e-5
    )
    np.testing.assert_allclose(
        losses.expert_balance(logits, routing, valid, "sequence"), np.mean(each), rtol=1e-5
    )
    assert abs(whole - np.mean(each)) > 1e-3  # the scopes are not the same thing


def test_uniform_routing_gives_exactly_one():
    ids = (jnp.arange(B * S)[:, None] * K + jnp.arange(K)) % E
    routing = Routing(ids, jnp.full((B * S, K), 1 / E), jnp.full((B * S, E), 1 / E))
    for scope in ("sequence", "global_batch"):
        value = losses.expert_balance(jnp.zeros((B * S, E)), routing, jnp.ones((B, S), bool), scope)
        np.testing.assert_allclose(value, 1.0, rtol=1e-6)


def test_collapsed_routing_costs_more():
    logits = jnp.zeros((B * S, E)).at[:, :K].set(8.0)
    value = losses.expert_balance(logits, route(logits), jnp.ones((B, S), bool), "sequence")
    np.testing.assert_allclose(value, E / K, rtol=1e-2)


def test_gradient_flows_through_the_affinities_only():
    logits, valid = random_case(0)

    def value(logits):
        return losses.expert_balance(logits, route(logits), valid, "global_batch")

    fixed = route(logits)
    f = np.asarray([E / (K * B * S) * np.sum(np.asarray(fixed.ids_TK) == i) for i in range(E)])

    def with_constant_f(logits):
        return (f * jax.nn.softmax(logits, axis=-1).mean(axis=0)).sum()

    got, want = jax.grad(value)(jnp.asarray(logits)), jax.grad(with_constant_f)(jnp.asarray(logits))
    np.testing.assert_allclose(got, want, atol=1e-7)
    assert np.abs(got).max() > 1e-4


@pytest.mark.parametrize("name", list(losses.BALANCE_TERMS))
@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_padding_counts_nowhere(name, scope):
    """A padded batch (with a sequence that is all padding) equals the batch without padding."""
    logits, _ = random_case(1)
    term = losses.BALANCE_TERMS[name]
    short = logits.reshape(B, S, E)[:2, :5].reshape(-1, E)
    want = term(short, route(short), jnp.ones((2, 5), bool), scope)
    valid = jnp.zeros((B, S), bool).at[:2, :5].set(True)
    np.testing.assert_allclose(term(logits, route(logits), valid, scope), want, rtol=1e-5)


def test_router_z_is_the_mean_squared_logsumexp():
    logits, valid = random_case(2)
    z = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)) ** 2
    np.testing.assert_allclose(
        losses.router_z(logits, route(logits), valid, "sequence"), z.mean(), rtol=1e-5
    )


def test_active_terms_are_those_with_a_weight():
    assert losses.active_terms(MoEConfig(expert_balance_factor=0.0)) == {}
    assert losses.active_terms(MoEConfig(router_z_factor=1e-3)) == {
        "expert_balance": 0.01,
        "router_z": 1e-3,
    }
    for name in losses.BALANCE_TERMS:  # every term has its weight in the config
        assert hasattr(MoEConfig(), f"{name}_factor")
