"""Balance terms against plain numpy written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.types import Routing

B, S, E, K = 3, 8, 6, 2
D, M = 3, 2  # devices, and how many of them a token may use
SCOPES = ["sequence", "global_batch"]
GROUPS = {"n_group": D, "topk_group": M, "expert_groups": D}


def random_case(seed, scale=2.0):
    logits = np.random.default_rng(seed).normal(size=(B * S, E), scale=scale).astype(np.float32)
    return logits, jnp.ones((B, S), bool)


def route(logits_TE):
    affinity = jax.nn.softmax(logits_TE, axis=-1)
    gates, ids = jax.lax.top_k(affinity, K)
    return Routing(ids, gates, affinity, jnp.asarray(logits_TE))


def scope(name, **kwargs):
    return MoEConfig(
        n_routed_experts=E, num_experts_per_tok=K, balance_scope=name, **{**GROUPS, **kwargs}
    )


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
        losses.expert_balance(routing, valid, scope("global_batch")), whole, rtol=1e-5
    )
    np.testing.assert_allclose(
        losses.expert_balance(routing, valid, scope("sequence")), np.mean(each), rtol=1e-5
    )
    assert abs(whole - np.mean(each)) > 1e-3  # the scopes are not the same thing


def numpy_device_balance(s, ids):
    """V1 eqs. 15-17: experts 2d and 2d + 1 are on device d."""
    t = len(s)
    f = np.array([E / (K * t) * np.sum(np.any(ids == i, axis=1)) for i in range(E)])
    p = s.mean(axis=0)
    return sum(np.mean(f[[2 * d, 2 * d + 1]]) * np.sum(p[[2 * d, 2 * d + 1]]) for d in range(D))


def numpy_communication_balance(s, ids):
    """V2 eqs. 29-31: each token is sent to a device at most once."""
    total = 0.0
    for d in range(D):
        sent = sum(any(i in (2 * d, 2 * d + 1) for i in row) for row in ids)
        total += D / (M * len(s)) * sent * (s[:, 2 * d] + s[:, 2 * d + 1]).mean()
    return total


def numpy_switch_balance(s, ids):
    """2101.03961 eqs. 4-6, with f by the first choice."""
    f = np.array([np.mean(ids[:, 0] == i) for i in range(E)])
    return E * np.sum(f * s.mean(axis=0))


BY_SCOPE = {
    "expert_balance": numpy_expert_balance,
    "device_balance": numpy_device_balance,
    "communication_balance": numpy_communication_balance,
    "switch_balance": numpy_switch_balance,
}


@pytest.mark.parametrize("skew", [0.0, 4.0])  # of the first three experts: adversarial at 4
@pytest.mark.parametrize("name", list(BY_SCOPE))
def test_terms_against_numpy(name, skew):
    logits, valid = random_case(7)
    routing = route(logits + skew * (np.arange(E) < 3))
    s, ids = np.asarray(routing.affinity_TE, np.float64), np.asarray(routing.ids_TK)
    each = [BY_SCOPE[name](s[b * S : b * S + S], ids[b * S : b * S + S]) for b in range(B)]
    term = losses.BALANCE_TERMS[name]
    for tokens, want in (("sequence", np.mean(each)), ("global_batch", BY_SCOPE[name](s, ids))):
        np.testing.assert_allclose(term(routing, valid, scope(tokens)), want, rtol=1e-5)


def test_sequence_balance_is_by_sequence_whatever_the_scope():
    logits, valid = random_case(3)
    values = [losses.sequence_balance(route(logits), valid, scope(s)) for s in SCOPES]
    want = losses.expert_balance(route(logits), valid, scope("sequence"))
    assert values == [want, want]


@pytest.mark.parametrize("name", [name for name in losses.BALANCE_TERMS if name != "router_z"])
def test_uniform_routing_gives_exactly_one(name):
    """Token t goes to experts t and t + 3 mod 6: all experts, devices and first choices alike."""
    ids = (jnp.arange(B * S)[:, None] + jnp.array([0, E // 2])) % E
    routing = Routing(ids, jnp.full((B * S, K), 1 / E), jnp.full((B * S, E), 1 / E))
    # With 8 tokens a sequence, 16 assignments cannot be even over 6 experts: one of 24 tokens.
    assert losses.BALANCE_TERMS[name](
        routing, jnp.ones((1, B * S), bool), scope("global_batch")
    ) == pytest.approx(1.0, rel=1e-6)


def test_uneven_devices_cost_more_even_if_no_expert_is_visited_twice():
    """Communication counts visits to a device: two experts on one device are one visit."""
    affinity = jnp.full((D, E), 1 / E)
    apart = Routing(jnp.array([[0, 2], [1, 4], [3, 5]]), jnp.ones((D, K)), affinity)
    together = Routing(jnp.array([[0, 1], [2, 3], [4, 5]]), jnp.ones((D, K)), affinity)
    valid = jnp.ones((1, D), bool)
    for routing, want in ((apart, 1.0), (together, 0.5)):
        value = losses.communication_balance(routing, valid, scope("sequence"))
        np.testing.assert_allclose(value, want, rtol=1e-6)
        expert = losses.expert_balance(routing, valid, scope("sequence"))
        np.testing.assert_allclose(expert, 1.0, rtol=1e-6)


def test_collapsed_routing_costs_more():
    logits = jnp.zeros((B * S, E)).at[:, :K].set(8.0)
    value = losses.expert_balance(route(logits), jnp.ones((B, S), bool), scope("sequence"))
    np.testing.assert_allclose(value, E / K, rtol=1e-2)


def test_gradient_flows_through_the_affinities_only():
    logits, valid = random_case(0)

    def value(logits):
        return losses.expert_balance(route(logits), valid, scope("global_batch"))

    fixed = route(logits)
    f = np.asarray([E / (K * B * S) * np.sum(np.asarray(fixed.ids_TK) == i) for i in range(E)])

    def with_constant_f(logits):
        return (f * jax.nn.softmax(logits, axis=-1).mean(axis=0)).sum()

    got, want = jax.grad(value)(jnp.asarray(logits)), jax.grad(with_constant_f)(jnp.asarray(logits))
    np.testing.assert_allclose(got, want, atol=1e-7)
    assert np.abs(got).max() > 1e-4


@pytest.mark.parametrize("name", list(losses.BALANCE_TERMS))
@pytest.mark.parametrize("tokens", SCOPES)
def test_padding_counts_nowhere(name, tokens):
    """A padded batch (with a sequence that is all padding) equals the batch without padding."""
    logits, _ = random_case(1)
    term = losses.BALANCE_TERMS[name]
    short = logits.reshape(B, S, E)[:2, :5].reshape(-1, E)
    want = term(route(short), jnp.ones((2, 5), bool), scope(tokens))
    valid = jnp.zeros((B, S), bool).at[:2, :5].set(True)
    np.testing.assert_allclose(term(route(logits), valid, scope(tokens)), want, rtol=1e-5)


def test_router_z_is_the_mean_squared_logsumexp():
    logits, valid = random_case(2)
    z = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)) ** 2
    np.testing.assert_allclose(
        losses.router_z(route(logits), valid, scope("sequence")), z.mean(), rtol=1e-5
    )


def test_active_terms_are_those_with_a_weight():
    assert losses.active_terms(MoEConfig(expert_balance_factor=0.0)) == {}
    assert losses.active_terms(MoEConfig(router_z_factor=1e-3)) == {
        "expert_balance": 0.01,
        "router_z": 1e-3,
    }
    for name in losses.BALANCE_TERMS:  # every term has its weight in the config
        assert hasattr(MoEConfig(), f"{name}_factor")
