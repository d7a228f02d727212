"""Scores, groups, bias and noise against plain numpy written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.moe.routers import scored
from dsmoe_jax.moe.types import RecordedRouting, RouterInputs
from tests.tools.routing import moe_config, route

T, E, K = 64, 8, 3
TOKENS = jnp.zeros(T, jnp.int32)


def random_logits(seed=0, width=E, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, width), scale=scale).astype(np.float32)


def softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_v3(logits, bias, k, n_group, topk_group):
    """V3 eqs. 12-16 and section 2.1.2, one token at a time."""
    ids, gates = [], []
    for u in logits.astype(np.float64):
        s = sigmoid(u)
        choice, size = s + bias, len(u) // n_group
        score = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(n_group)]
        best = np.argsort(-np.array(score), kind="stable")[:topk_group]
        allowed = [i for i in range(len(u)) if i // size in best]
        chosen = sorted(allowed, key=lambda i: (-choice[i], i))[:k]
        ids.append(chosen)
        gates.append(2.5 * s[chosen] / s[chosen].sum())
    return np.array(ids), np.array(gates)


def numpy_v2(logits, k, n_group, topk_group):
    """V2 eqs. 20-22 and section 2.2.2: softmax, device scored by its max, gates scaled by 16."""
    ids, gates = [], []
    for s in softmax(logits.astype(np.float64)):
        size = len(s) // n_group
        score = [s[g * size : (g + 1) * size].max() for g in range(n_group)]
        best = np.argsort(-np.array(score), kind="stable")[:topk_group]
        allowed = [i for i in range(len(s)) if i // size in best]
        chosen = sorted(allowed, key=lambda i: (-s[i], i))[:k]
        ids.append(chosen)
        gates.append(16 * s[chosen])
    return np.array(ids), np.array(gates)


# The bias makes most choice scores negative: a masked expert at 0 would win.
@pytest.mark.parametrize("bias", [0.0, -3.0])
@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (4, 3), (2, 1), (1, 1)])
def test_v3_node_limited_with_bias(groups, kept, bias):
    logits = random_logits(groups)
    bias_E = bias + np.random.default_rng(1).normal(size=E, scale=0.3).astype(np.float32)
    config = moe_config(
        k=K, scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
        n_group=groups, topk_group=kept, group_score="top2_sum", bias_update_speed=1e-3,
    )  # fmt: skip
    routing = route(logits, RouterInputs(TOKENS, state={"bias_E": jnp.asarray(bias_E)}), config)
    ids, gates = numpy_v3(logits, bias_E, 3, groups, kept)
    np.testing.assert_array_equal(routing.ids_TK, ids)
    np.testing.assert_allclose(routing.gates_TK, gates, rtol=1e-5)
    s = sigmoid(logits.astype(np.float64))
    np.testing.assert_allclose(routing.affinity_TE, s / s.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (4, 3), (8, 3), (2, 1)])
def test_v2_device_limited(groups, kept):
    logits = random_logits(groups)
    config = moe_config(k=K, n_group=groups, topk_group=kept, routed_scaling_factor=16.0)
    routing = route(logits, RouterInputs(TOKENS), config)
    ids, gates = numpy_v2(logits, 3, groups, kept)
    np.testing.assert_array_equal(routing.ids_TK, ids)
    np.testing.assert_allclose(routing.gates_TK, gates, rtol=1e-5)


def test_v2_and_v3_pick_different_groups():
    """Group 0 has the best expert, group 1 the best pair."""
    logits = jnp.array([[3.0, -9, -9, -9, 2.5, 2.4, -9, -9]])
    for score, ids in (("max", [0, 1]), ("top2_sum", [4, 5])):
        config = moe_config(k=2, n_group=2, topk_group=1, group_score=score)
        assert route(logits, RouterInputs(TOKENS[:1]), config).ids_TK.tolist() == [ids]


def test_a_masked_expert_does_not_win_over_negative_scores():
    """With a fill of 0 the masked experts 4, 5 would beat group 0's biased, negative scores."""
    config = moe_config(
        "topk", k=2, scoring_func="sigmoid", n_group=2, topk_group=1, bias_update_speed=1e-3
    )
    bias_E = jnp.array([-1.1, -1.2, -2, -2, -3, -3, -3, -3], jnp.float32)
    routing = route(jnp.zeros((1, E)), RouterInputs(TOKENS[:1], state={"bias_E": bias_E}), config)
    assert routing.ids_TK.tolist() == [[0, 1]]


def test_ties_of_groups_and_experts_go_to_the_lower_index():
    config = moe_config(k=K, n_group=4, topk_group=2)
    routing = route(jnp.zeros((4, E)), RouterInputs(TOKENS[:4]), config)
    np.testing.assert_array_equal(routing.ids_TK, np.tile([0, 1, 2], (4, 1)))


def test_the_bias_chooses_but_neither_weighs_nor_learns():
    logits = jnp.asarray(random_logits(5))
    config = moe_config(k=K, bias_update_speed=1e-3)
    bias_E = jnp.zeros(E).at[3].set(5.0)

    def gates(logits, bias_E):
        routing = route(logits, RouterInputs(TOKENS, state={"bias_E": bias_E}), config)
        return (routing.gates_TK**2).sum(), routing

    (_, routing), grads = jax.value_and_grad(gates, argnums=(0, 1), has_aux=True)(logits, bias_E)
    assert (routing.ids_TK[:, 0] == 3).all()
    want = np.take_along_axis(softmax(np.asarray(logits)), np.asarray(routing.ids_TK), axis=1)
    np.testing.assert_allclose(routing.gates_TK, want, rtol=1e-5)
    assert jnp.abs(grads[0]).max() > 1e-3
    np.testing.assert_array_equal(grads[1], 0.0)


@pytest.mark.parametrize("logit", [-30.0, -45.0, -60.0, -200.0])
def test_scores_that_vanish_are_no_error(logit):
    """No score of a token is much above 0: its gates and affinities and their gradients are."""
    config = moe_config("topk", k=K, scoring_func="sigmoid", norm_topk_prob=True)

    def outputs(logits):
        routing = route(logits, RouterInputs(TOKENS), config)
        return (routing.gates_TK[:, 0] + routing.affinity_TE[:, 1]).sum(), routing

    logits = logit + jnp.asarray(random_logits(6, scale=0.1))
    (_, routing), grads = jax.value_and_grad(outputs, has_aux=True)(logits)
    for x in (routing.gates_TK, routing.affinity_TE, grads):
        assert jnp.isfinite(x).all()


@pytest.mark.parametrize("renormalise", [True, False])
def test_gshard_keeps_the_second_expert_in_proportion_to_its_gate(renormalise):
    config = moe_config(
        "gshard", k=2, norm_topk_prob=renormalise, options={"random_second_expert": True}
    )
    logits = np.tile([2.0, 1.0, 0, 0, 0, 0, 0, 0], (T, 1)).astype(np.float32)
    share = 1 / (1 + np.e)  # of the second among the two
    both = 1.0 if renormalise else softmax(logits[0])[:2].sum()
    routings = jax.vmap(lambda rng: route(logits, RouterInputs(TOKENS, rng=rng), config))(
        jax.random.split(jax.random.key(0), 50)
    )
    kept = np.asarray(routings.ids_TK[..., 1] < E)
    assert abs(kept.mean() - 2 * share) < 4 * np.sqrt(0.25 / kept.size)
    second = np.where(kept, both * share, 0)
    np.testing.assert_allclose(routings.gates_TK[..., 1], second, rtol=1e-5)
    np.testing.assert_allclose(routings.gates_TK[..., 0], both * (1 - share), rtol=1e-5)
    evaluated = route(logits, RouterInputs(TOKENS), config)
    np.testing.assert_array_equal(evaluated.ids_TK, np.tile([0, 1], (T, 1)))


def test_replayed_experts_get_the_gates_of_live_scores():
    """Whatever the best ones are; an unassigned one, id E, has gate 0 and counts in no sum."""
    rng, logits = np.random.default_rng(4), random_logits(4)
    ids = np.argsort(rng.random((T, E + 1)), axis=1)[:, :3].astype(np.int32)
    config = moe_config("replay_ids", k=K, scoring_func="sigmoid", norm_topk_prob=True)
    replayed = RecordedRouting(jnp.asarray(ids), jnp.zeros((T, 3)))
    routing = route(logits, RouterInputs(TOKENS, rng=jax.random.key(0), replayed=replayed), config)
    s = sigmoid(logits.astype(np.float64))
    chosen = np.take_along_axis(np.pad(s, ((0, 0), (0, 1))), ids, axis=1)
    np.testing.assert_array_equal(routing.ids_TK, ids)
    np.testing.assert_allclose(routing.gates_TK, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(routing.affinity_TE, s / s.sum(axis=1, keepdims=True), rtol=1e-5)


def test_noise_has_its_learned_scale_and_is_for_training_only():
    """1701.06538 eqs. 3-5: softmax over the K kept of x W_g + normal softplus(x W_noise)."""
    logits = random_logits(2, width=2 * E)
    logits[:, E:] = np.linspace(-8, 3, E)
    config = moe_config("noisy_topk", k=K, norm_topk_prob=True)
    calm = route(logits, RouterInputs(TOKENS), config)
    np.testing.assert_array_equal(calm.logits_TE, logits[:, :E])
    ids = np.argsort(-logits[:, :E], axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(calm.ids_TK, ids)
    kept = np.take_along_axis(logits[:, :E], ids, axis=1)
    np.testing.assert_allclose(calm.gates_TK, softmax(kept), rtol=1e-5)
    noisy = jax.vmap(lambda rng: route(logits, RouterInputs(TOKENS, rng=rng), config).logits_TE)(
        jax.random.split(jax.random.key(0), 50)
    )
    spread_E = np.std(np.asarray(noisy) - logits[:, :E], axis=(0, 1))
    np.testing.assert_allclose(spread_E, np.log1p(np.exp(np.linspace(-8, 3, E))), rtol=0.08)


def test_noise_scale_gets_a_gradient():
    config = moe_config("noisy_topk", k=K)
    inputs = RouterInputs(TOKENS, rng=jax.random.key(0))
    grad = jax.grad(lambda x: route(x, inputs, config).gates_TK.sum())(
        random_logits(0, width=2 * E)
    )
    assert jnp.abs(grad[:, E:]).max() > 1e-4


def test_dynamic_specialised_router_sums_shares_of_one_softmax():
    logits = random_logits(3, width=4 * E)
    routing = route(logits, RouterInputs(TOKENS), moe_config("dynamic_specialised", k=K))
    s = softmax(logits.astype(np.float64)).reshape(T, E, 4).sum(axis=2)
    np.testing.assert_allclose(routing.affinity_TE, s, rtol=1e-5)
    np.testing.assert_array_equal(routing.ids_TK, np.argsort(-s, axis=1, kind="stable")[:, :3])


def test_dynamic_specialised_router_as_printed_routes_nothing():
    """Softmax over each expert's own four, then their mean: 1/4 whatever the token and weights."""
    logits = random_logits(3, width=4 * E, scale=5.0)
    printed = softmax(logits.reshape(T, E, scored.SUB_EXPERTS)).mean(axis=2)
    np.testing.assert_allclose(printed, 0.25, rtol=1e-6)
    working = route(logits, RouterInputs(TOKENS), moe_config("dynamic_specialised", k=K))
    assert np.ptp(working.affinity_TE, axis=1).min() > 0.1
