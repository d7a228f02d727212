"""Balance terms against plain numpy written from the papers."""

import dataclasses

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
    """A config in which every term has this scope."""
    scopes = {f.name: name for f in dataclasses.fields(MoEConfig) if f.name.endswith("_scope")}
    return MoEConfig(n_routed_experts=E, num_experts_per_tok=K, **{**GROUPS, **scopes, **kwargs})


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
        losses.term("expert_balance", routing, valid, scope("global_batch")), whole, rtol=1e-5
    )
    np.testing.assert_allclose(
        losses.term("expert_balance", routing, valid, scope("sequence")), np.mean(each), rtol=1e-5
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
    for tokens, want in (("sequence", np.mean(each)), ("global_batch", BY_SCOPE[name](s, ids))):
        got = losses.term(name, routing, valid, scope(tokens))
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sequence_balance_is_by_sequence_whatever_the_scope():
    logits, valid = random_case(3)
    values = [losses.term("sequence_balance", route(logits), valid, scope(s)) for s in SCOPES]
    want = losses.term("expert_balance", route(logits), valid, scope("sequence"))
    assert values == [want, want]


@pytest.mark.parametrize("name", [name for name in losses.BALANCE_TERMS if name != "router_z"])
def test_uniform_routing_gives_exactly_one(name):
    """Token t goes to experts t and t + 3 mod 6: all experts, devices and first choices alike."""
    ids = (jnp.arange(B * S)[:, None] + jnp.array([0, E // 2])) % E
    routing = Routing(ids, jnp.full((B * S, K), 1 / E), jnp.full((B * S, E), 1 / E))
    # With 8 tokens a sequence, 16 assignments cannot be even over 6 experts: one of 24 tokens.
    for tokens in SCOPES:
        value = losses.term(name, routing, jnp.ones((1, B * S), bool), scope(tokens))
        assert value == pytest.approx(1.0, rel=1e-6)


def test_uneven_devices_cost_more_even_if_no_expert_is_visited_twice():
    """Communication counts visits to a device: two experts on one device are one visit."""
    affinity = jnp.full((D, E), 1 / E)
    apart = Routing(jnp.array([[0, 2], [1, 4], [3, 5]]), jnp.ones((D, K)), affinity)
    together = Routing(jnp.array([[0, 1], [2, 3], [4, 5]]), jnp.ones((D, K)), affinity)
    valid = jnp.ones((1, D), bool)
    for routing, want in ((apart, 1.0), (together, 0.5)):
        value = losses.term("communication_balance", routing, valid, scope("sequence"))
        np.testing.assert_allclose(value, want, rtol=1e-6)
        expert = losses.term("expert_balance", routing, valid, scope("sequence"))
        np.testing.assert_allclose(expert, 1.0, rtol=1e-6)


def test_a_token_with_fewer_experts_than_devices_reaches_no_more_devices_than_experts():
    """M = 3 devices allowed, K = 2 experts: spread evenly over the devices it still costs 1."""
    ids = jnp.array([[0, 2], [4, 0], [2, 4]])
    routing = Routing(ids, jnp.ones((D, K)), jnp.full((D, E), 1 / E))
    config = scope("sequence", topk_group=D)
    value = losses.term("communication_balance", routing, jnp.ones((1, D), bool), config)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)


def test_collapsed_routing_costs_more():
    logits = jnp.zeros((B * S, E)).at[:, :K].set(8.0)
    value = losses.term("expert_balance", route(logits), jnp.ones((B, S), bool), scope("sequence"))
    np.testing.assert_allclose(value, E / K, rtol=1e-2)


def test_gradient_flows_through_the_affinities_only():
    logits, valid = random_case(0)

    def value(logits):
        return losses.term("expert_balance", route(logits), valid, scope("global_batch"))

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
    short = logits.reshape(B, S, E)[:2, :5].reshape(-1, E)
    want = losses.term(name, route(short), jnp.ones((2, 5), bool), scope(tokens))
    valid = jnp.zeros((B, S), bool).at[:2, :5].set(True)
    got = losses.term(name, route(logits), valid, scope(tokens))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_router_z_is_the_mean_squared_logsumexp():
    logits, _ = random_case(2)
    valid = np.ones((B, S), bool)
    valid[0, 3:] = False
    z_BS = (np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)) ** 2).reshape(B, S)
    by_sequence = np.mean([z_BS[0, :3].mean(), *z_BS[1:].mean(axis=1)])
    for tokens, want in (("sequence", by_sequence), ("global_batch", z_BS[valid].mean())):
        got = losses.term("router_z", route(logits), jnp.asarray(valid), scope(tokens))
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", list(losses.BALANCE_TERMS))
@pytest.mark.parametrize("tokens", SCOPES)
def test_values_of_parts_add_up(name, tokens):
    """A batch in three parts of a sequence each, one of them padded, one nothing but padding."""
    logits, _ = random_case(5)
    routing, config = route(logits), scope(tokens)
    valid = jnp.ones((B, S), bool).at[1, 4:].set(False).at[2].set(False)
    parts = []
    for b in range(B):
        own = jax.tree.map(lambda x, b=b: x[b * S : b * S + S], routing)
        parts.append(losses.part(name, own, valid[b : b + 1], config))
    sent = None if parts[0].sent_G is None else {name: sum(part.sent_G for part in parts)}
    whole = losses.whole(valid, sent)
    got = sum(losses.value(name, part, whole) for part in parts)
    np.testing.assert_allclose(got, losses.term(name, routing, valid, config), rtol=1e-6)


def test_each_term_has_its_own_scope():
    logits, valid = random_case(4)
    mixed = scope("sequence", device_balance_scope="global_batch")
    for name, tokens in (("expert_balance", "sequence"), ("device_balance", "global_batch")):
        got = losses.term(name, route(logits), valid, mixed)
        assert got == losses.term(name, route(logits), valid, scope(tokens))
    active = dataclasses.replace(mixed, device_balance_factor=0.1)
    assert losses.counted_terms(active) == ["device_balance"]
    assert losses.counted_terms(mixed) == []


def test_weights_follow_their_schedules():
    """Against numpy's interpolation; two pairs with the same share are a jump."""
    ramp, stairs = ((0.1, 0.0), (0.5, 2.0)), ((0.5, 1.0), (0.5, 0.25))
    config = scope(
        "sequence", expert_balance_schedule=ramp, router_z_factor=0.5, router_z_schedule=stairs,
        switch_balance_factor=0.3,
    )  # fmt: skip
    for share in (0.0, 0.1, 0.2, 0.4999, 0.5, 0.9, 1.0):
        got = losses.weights_at(config, jnp.float32(share))
        want = 0.01 * np.interp(share, [0.1, 0.5], [0.0, 2.0])
        np.testing.assert_allclose(got["expert_balance"], want, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(got["router_z"], 0.5 if share < 0.5 else 0.125, rtol=1e-6)
        np.testing.assert_allclose(got["switch_balance"], 0.3, rtol=1e-6)
        assert set(got) == {"expert_balance", "router_z", "switch_balance"}


def test_active_terms_are_those_with_a_weight():
    assert losses.active_terms(MoEConfig(expert_balance_factor=0.0)) == {}
    assert losses.active_terms(MoEConfig(router_z_factor=1e-3)) == {
        "expert_balance": 0.01,
        "router_z": 1e-3,
    }
    for name in losses.BALANCE_TERMS:  # every term has its weight in the config
        assert hasattr(MoEConfig(), f"{name}_factor")
        assert hasattr(MoEConfig(), f"{name}_schedule")
