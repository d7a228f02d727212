"""Scores, groups, bias and noise against plain numpy written from the papers."""

import dataclasses
import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.moe import report
from dsmoe_jax.moe.kernels import native, rows
from dsmoe_jax.moe.routers import get_router, scored
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


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


@pytest.mark.parametrize("level", [-200.0, -60.0, -45.0, -30.0, 0.0, 30.0])
def test_sigmoid_gates_and_affinities_at_any_level_of_the_logits(level):
    """Rows sum to 1, values and gradients are the formula's in float64: s / sum s, ds = s (1 - s).

    No router earns a smaller balance term by sinking: s of float32 is 0 below -104, and s / (sum s
    + 1e-18) below -40 is not a share.
    """
    config = moe_config("topk", k=K, scoring_func="sigmoid", norm_topk_prob=True)
    logits = level + jnp.asarray(random_logits(6, scale=1.0))
    rng = np.random.default_rng(7)
    by_gate_TK, by_affinity_TE = rng.normal(size=(T, K)), rng.normal(size=(T, E))

    def outputs(logits):
        routing = route(logits, RouterInputs(TOKENS), config)
        weighted = (routing.gates_TK * by_gate_TK).sum()
        return weighted + (routing.affinity_TE * by_affinity_TE).sum(), routing

    (_, routing), grad = jax.value_and_grad(outputs, has_aux=True)(logits)
    z = np.asarray(logits, np.float64)
    ids = np.argsort(-z, axis=1, kind="stable")[:, :K]
    p_TE, g_TK = softmax(log_sigmoid(z)), softmax(np.take_along_axis(log_sigmoid(z), ids, axis=1))
    np.testing.assert_array_equal(routing.ids_TK, ids)
    np.testing.assert_allclose(routing.affinity_TE, p_TE, rtol=1e-5)
    np.testing.assert_allclose(routing.gates_TK, g_TK, rtol=1e-5)
    for shares in (routing.affinity_TE, routing.gates_TK):
        np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-6)
    want = p_TE * (by_affinity_TE - (p_TE * by_affinity_TE).sum(axis=1, keepdims=True))
    through_gates = g_TK * (by_gate_TK - (g_TK * by_gate_TK).sum(axis=1, keepdims=True))
    np.put_along_axis(want, ids, np.take_along_axis(want, ids, axis=1) + through_gates, axis=1)
    want /= 1 + np.exp(z)  # d log s / dz = 1 - s
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


def chosen_by_bias(name, **section):
    """Gates of experts 5, 6 and 7, and their gradient, far below those that the scores prefer."""
    config = moe_config(name, k=3, norm_topk_prob=True, bias_update_speed=1e-3, **section)
    bias_E = jnp.zeros(E).at[5:].set(jnp.array([9.0, 8.0, 7.0]))
    logits = np.tile(np.array([0, 0, 0, 0, 0, -150, -151, -149], np.float32), (4, 1))
    if name == "dynamic_specialised":
        logits = np.repeat(logits, scored.SUB_EXPERTS, axis=1)
    inputs = RouterInputs(TOKENS[:4], state={"bias_E": bias_E})

    def gates(logits):
        routing = route(logits, inputs, config)
        return routing.gates_TK[:, 0].sum(), routing

    (_, routing), grad = jax.value_and_grad(gates, has_aux=True)(jnp.asarray(logits))
    np.testing.assert_array_equal(routing.ids_TK, np.tile([5, 6, 7], (4, 1)))
    return routing.gates_TK, grad.reshape(4, E, -1).sum(axis=2)


@pytest.mark.parametrize(
    ("name", "section"),
    [("topk", {}), ("topk", {"scoring_func": "sigmoid"}), ("dynamic_specialised", {})],
)
def test_gates_of_scores_that_vanish_sum_to_one(name, section):
    """A bias, a probe or a balanced choice may take experts whose scores are 0 in float32."""
    gates_TK, grad_TE = chosen_by_bias(name, **section)
    want = softmax(np.array([-150.0, -151.0, -149.0]))
    np.testing.assert_allclose(gates_TK, np.tile(want, (4, 1)), rtol=1e-5)
    slope = want[0] * (np.array([1.0, 0, 0]) - want)
    np.testing.assert_allclose(grad_TE[:, 5:], np.tile(slope, (4, 1)), rtol=1e-4)
    np.testing.assert_array_equal(grad_TE[:, :5], 0.0)


def test_sinkhorn_gates_of_scores_that_vanish_sum_to_one():
    """Every token prefers expert 0 by 150; the balancing gives most of them others."""
    config = moe_config("sinkhorn", k=2, norm_topk_prob=True, options={"iterations": 30})
    logits = random_logits(8, scale=0.5)
    logits[:, 0] += 150
    inputs = RouterInputs(TOKENS, rng=jax.random.key(0))
    routing = route(logits, inputs, config)
    chosen = np.take_along_axis(logits.astype(np.float64), np.asarray(routing.ids_TK), axis=1)
    assert (chosen.max(axis=1) < 100).mean() > 0.5
    np.testing.assert_allclose(routing.gates_TK, softmax(chosen), rtol=1e-5, atol=1e-30)
    grad = jax.grad(lambda z: route(z, inputs, config).gates_TK[:, 0].sum())(jnp.asarray(logits))
    assert jnp.isfinite(grad).all()


def exact_groups(logits, kept):
    """The best groups of two by the sum of their sigmoids, in decimals of 200 places."""
    with decimal.localcontext(prec=200):
        s = [1 / (1 + (-decimal.Decimal(float(z))).exp()) for z in logits]
        pairs = [s[i] + s[i + 1] for i in range(0, len(s), 2)]
    return sorted(range(len(pairs)), key=lambda g: -pairs[g])[:kept]


@pytest.mark.parametrize("scale", [2.0, 20.0, 60.0])
@pytest.mark.parametrize("score", ["no groups", "max", "top2_sum"])
def test_saturated_sigmoids_do_not_tie(scale, score):
    """Without a bias the choice is that of exact numbers; N(0, 20^2) is 0 or 1 in float32."""
    logits = random_logits(9, scale=scale)
    section = {} if score == "no groups" else {"n_group": 4, "topk_group": 2, "group_score": score}
    config = moe_config(k=K, scoring_func="sigmoid", **section)
    allowed = np.ones((T, E), bool)
    if score == "max":
        group = logits.reshape(T, 4, 2).max(axis=2)
        allowed = np.repeat(group >= np.sort(group, axis=1)[:, 2:3], 2, axis=1)
    elif score == "top2_sum":
        best = np.array([exact_groups(u, 2) for u in logits])
        allowed = (np.arange(E) // 2 == best[:, :, None]).any(axis=1)
    want = np.argsort(-np.where(allowed, logits, -np.inf), axis=1, kind="stable")[:, :K]
    for top_k in (rows.top_k, native.rows.top_k):
        router, found = get_router(config)
        found = dataclasses.replace(found, top_k=top_k)
        routing = router.route(jnp.asarray(logits), RouterInputs(TOKENS), found)
        np.testing.assert_array_equal(routing.ids_TK, want)
        s = sigmoid(np.take_along_axis(logits.astype(np.float64), want, axis=1))
        np.testing.assert_allclose(routing.gates_TK, s, rtol=1e-5, atol=1e-37)


def test_the_top_gate_is_the_largest():
    """Whoever a bias puts first."""
    config = moe_config(k=K, bias_update_speed=1e-3)
    bias_E = jnp.zeros(E).at[3].set(5.0)
    routing = route(random_logits(10), RouterInputs(TOKENS, state={"bias_E": bias_E}), config)
    assert (routing.gates_TK.argmax(axis=1) > 0).mean() > 0.5
    columns = report.token_columns(routing, None, softmax=True)
    np.testing.assert_array_equal(columns["top_gate"], np.max(routing.gates_TK, axis=1))


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


@pytest.mark.parametrize("section", [{"scoring_func": "sigmoid"}, {"routed_scaling_factor": 0.0}])
def test_gshard_keeps_the_second_expert_in_proportion_to_its_score_at_any_level(section):
    """Both gates may be 0 in float32."""
    config = moe_config("gshard", k=2, options={"random_second_expert": True}, **section)
    logits = np.tile([2.0, 1.0, 0, 0, 0, 0, 0, 0], (T, 1)).astype(np.float32) - 200
    kept = jax.vmap(lambda rng: route(logits, RouterInputs(TOKENS, rng=rng), config).ids_TK)(
        jax.random.split(jax.random.key(0), 50)
    )
    share = np.mean(np.asarray(kept[..., 1]) < E)
    assert abs(share - 2 / (1 + np.e)) < 4 * np.sqrt(0.25 / (50 * T))


@pytest.mark.parametrize("renormalise", [True, False])
def test_replayed_experts_get_the_gates_of_live_scores(renormalise):
    """Whatever the best ones are: normalised over all that was chosen, 0 for what was left out.

    What was dropped keeps its gate here, as in the recorded router; padding, id E, has none.
    """
    rng, logits = np.random.default_rng(4), random_logits(4)
    chosen = np.argsort(rng.random((T, E)), axis=1)[:, :3].astype(np.int32)
    chosen[-5:] = E
    sent = np.where(rng.random((T, 3)) < 0.7, chosen, E)
    computed = np.where(rng.random((T, 3)) < 0.7, sent, E)
    config = moe_config("replay_ids", k=K, scoring_func="sigmoid", norm_topk_prob=renormalise)
    replayed = RecordedRouting(*map(jnp.asarray, (computed, np.zeros((T, 3)), sent, chosen)))
    routing = route(logits, RouterInputs(TOKENS, rng=jax.random.key(0), replayed=replayed), config)
    s = sigmoid(logits.astype(np.float64))
    gates = np.take_along_axis(np.pad(s, ((0, 0), (0, 1))), chosen, axis=1)
    if renormalise:
        gates[:-5] /= gates[:-5].sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(routing.ids_TK, sent)
    np.testing.assert_allclose(routing.gates_TK, np.where(sent < E, gates, 0), rtol=1e-5)
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
