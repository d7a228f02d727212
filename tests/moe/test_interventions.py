"""A trained layer with masked experts, another K or no shared expert, against plain numpy.

Shapes: T tokens, D hidden, F expert width, E routed experts, K activated per token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.moe.interventions import GENERATION, NONE, Intervention, check_left_out
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routers import ROUTERS
from dsmoe_jax.moe.types import MoEInputs, RouterInputs
from tests.tools.routing import TASKS, tasks_of

T, D, E, K = 14, 8, 6, 2
V3 = {
    "router.scoring_func": "sigmoid",
    "router.norm_topk_prob": True,
    "router.n_group": 3,
    "router.topk_group": 2,
    "router.group_score": "top2_sum",
    "router.bias_update_speed": 1e-3,
}
SOFTMAX_GROUPS = {"router.n_group": 3, "router.topk_group": 2, "router.group_score": "top2_sum"}
BIAS_E = np.linspace(0.4, -0.4, E).astype(np.float32)


def make_layer(k=K, **moe):
    changes = {
        "n_routed_experts": E,
        "num_experts_per_tok": k,
        "moe_intermediate_size": 12,
        "expert_backend": "loop",
        "balance.expert": None,
        **moe,
    }
    config = replace(Config(), **{f"model.moe.{key}": value for key, value in changes.items()})
    layer = MoELayer(
        config.model.moe, hidden_size=D, vocab_size=50, initializer_range=0.5, rngs=nnx.Rngs(0)
    )
    if "router.bias_update_speed" in moe:
        layer.bias_E[...] = jnp.asarray(BIAS_E)
    return layer


def activations():
    return jax.random.normal(jax.random.key(1), (2, T // 2, D))


def evaluate(layer, intervention, left_out=()):
    left_out_E = jnp.isin(jnp.arange(E), jnp.array(left_out)) if left_out else None
    inputs = MoEInputs(
        jnp.arange(T).reshape(2, T // 2), jnp.ones((2, T // 2), bool), left_out_E=left_out_E
    )
    return layer(activations(), inputs, intervention)


def swiglu(x, gate, up, down):
    z = gate @ x
    return down @ (z / (1 + np.exp(-z)) * (up @ x))


def numpy_choice(logits, k, masked, left_out=()):
    """V1 eqs. 10-11: the K best but for the first few; ids and gates of one token."""
    s = np.exp(logits) / np.exp(logits).sum()
    order = [i for i in np.argsort(-s, kind="stable") if i not in left_out]
    chosen = np.array(order[masked : masked + k])
    return chosen, s[chosen]


def numpy_choice_v3(logits, k, masked, left_out=()):
    """V3 eqs. 12-16 in the best two of three groups of two: the bias chooses, and is masked by."""
    s = 1 / (1 + np.exp(-logits))
    choice = s + BIAS_E
    there = [i for i in np.argsort(-choice, kind="stable") if i not in left_out]
    groups = {i // 2 for i in there}
    worth = {g: sum(choice[i] for i in there if i // 2 == g) for g in groups}
    allowed = sorted(groups, key=lambda g: -worth[g])[:2]
    chosen = np.array([i for i in there if i // 2 in allowed][masked : masked + k])
    return chosen, s[chosen] / s[chosen].sum()


def numpy_choice_in_groups(logits, k, masked, left_out=()):
    """The softmax without a bias in the best two of three groups of two, gates as they are."""
    s = np.exp(logits) / np.exp(logits).sum()
    there = [i for i in np.argsort(-s, kind="stable") if i not in left_out]
    worth_G = np.bincount([i // 2 for i in there], s[there], minlength=3)
    allowed = np.argsort(-worth_G, kind="stable")[:2]
    chosen = np.array([i for i in there if i // 2 in allowed][masked : masked + k])
    return chosen, s[chosen]


def numpy_layer(layer, choice, k, masked, shared, left_out=()):
    x_TD = np.asarray(activations(), np.float64).reshape(T, D)
    router, gate, up, down = (
        np.asarray(w[...], np.float64)
        for w in (layer.router_ED, layer.gate_EFD, layer.up_EFD, layer.down_EDF)
    )
    wide = layer.shared
    shared_weights = [np.asarray(w[...]) for w in (wide.gate_FD, wide.up_FD, wide.down_DF)]
    ids, y_TD = [], []
    for x in x_TD:
        chosen, gates = choice(router @ x, k, masked, left_out)
        y = sum(g * swiglu(x, gate[i], up[i], down[i]) for i, g in zip(chosen, gates, strict=True))
        y_TD.append(y + swiglu(x, *shared_weights) if shared else y)
        ids.append(chosen)
    return np.array(ids), np.array(y_TD)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("masked", "k"), [(0, None), (1, None), (2, None), (0, 4), (0, 1), (1, 3)])
@pytest.mark.parametrize(("settings", "choice"), [({}, numpy_choice), (V3, numpy_choice_v3)])
def test_against_numpy(settings, choice, masked, k, shared):
    layer = make_layer(**settings)
    y_BSD, report = evaluate(layer, Intervention(masked, k, shared))
    ids, y_TD = numpy_layer(layer, choice, k or K, masked, shared)
    np.testing.assert_array_equal(report.recorded.ids.reshape(T, -1), ids)
    np.testing.assert_allclose(y_BSD.reshape(T, D), y_TD, atol=1e-5)
    sent_E = np.bincount(ids.ravel(), minlength=E)
    np.testing.assert_array_equal(report.logged.ledger.sent_E, sent_E)
    np.testing.assert_array_equal(report.logged.ledger.computed_E, sent_E)


@pytest.mark.parametrize(
    ("settings", "choice", "masked", "left_out"),
    [
        ({}, numpy_choice, 0, (1,)),
        ({}, numpy_choice, 2, (0, 3)),
        (V3, numpy_choice_v3, 0, (4,)),
        (V3, numpy_choice_v3, 0, (1, 2)),
        (V3, numpy_choice_v3, 1, (0, 1)),  # a group without experts
        (SOFTMAX_GROUPS, numpy_choice_in_groups, 0, (1, 2)),
    ],
)
def test_left_out_experts_against_numpy(settings, choice, masked, left_out):
    """A token takes its next best ones; a group is worth what is left of it."""
    layer = make_layer(**settings)
    y_BSD, report = evaluate(layer, Intervention(masked), left_out)
    ids, y_TD = numpy_layer(layer, choice, K, masked, shared=True, left_out=left_out)
    np.testing.assert_array_equal(report.recorded.ids.reshape(T, -1), ids)
    np.testing.assert_allclose(y_BSD.reshape(T, D), y_TD, atol=1e-5)
    np.testing.assert_array_equal(report.logged.ledger.computed_E[np.array(left_out)], 0)


def test_no_intervention_is_the_layer_as_it_was_trained():
    layer = make_layer()
    inputs = MoEInputs(jnp.arange(T).reshape(2, T // 2), jnp.ones((2, T // 2), bool))
    plain = layer(activations(), inputs)[0]
    np.testing.assert_array_equal(plain, evaluate(layer, NONE)[0])
    np.testing.assert_array_equal(plain, evaluate(layer, Intervention())[0])


def test_a_layer_without_routed_experts_keeps_its_ffn():
    """A dense layer below MoE layers is no shared expert."""
    layer = make_layer(k=0, n_routed_experts=0)
    with_it, without = (evaluate(layer, Intervention(shared_experts=s))[0] for s in (True, False))
    np.testing.assert_array_equal(with_it, without)


def test_the_capacity_is_that_of_the_other_k():
    """Half of the mean of the assignments that there are, not of those in training."""
    layer = make_layer(**{"evaluation_drop.capacity_factor": 0.5})
    for k in (1, 2, 4):
        ledger = evaluate(layer, Intervention(num_experts_per_tok=k))[1].logged.ledger
        assert ledger.sent_E.sum() == T * k
        assert ledger.computed_E.max() == np.ceil(0.5 * T * k / E)


@pytest.mark.parametrize("name", [n for n, r in ROUTERS.items() if r.needs_recording != "routing"])
def test_every_router_heeds_an_intervention_or_refuses_it(name):
    """In evaluation the second best take the place of masked ones, and K is another number."""
    layer = make_layer(
        k=ROUTERS[name].top or K, **{"router.name": name, "router.tasks": tasks_of(name)}
    )
    x_TD = activations().reshape(T, D)
    tokens = RouterInputs(jnp.arange(T), task_ids_T=jnp.arange(T) % len(TASKS))

    def ids(intervention):
        return np.asarray(layer.route(x_TD, tokens, intervention=intervention)[0].ids_TK)

    if ROUTERS[name].top is None and not ROUTERS[name].own_k:
        columns = ROUTERS[name].columns(E, 3)
        assert ids(Intervention(num_experts_per_tok=3)).shape == (T, columns)
    else:
        with pytest.raises(ValueError, match=rf"num_experts_per_tok=3: the {name} router activ"):
            ids(Intervention(num_experts_per_tok=3))
    left_out = tokens._replace(left_out_E=jnp.arange(E) == 2)
    if ROUTERS[name].leaves_out:
        got = np.asarray(layer.route(x_TD, left_out)[0].ids_TK)
        assert (got != 2).all()
        if ROUTERS[name].masks_best:  # a token without the expert stays as it was
            plain = ids(NONE)
            same = (plain != 2).all(axis=1)
            np.testing.assert_array_equal(got[same], plain[same])
    else:
        with pytest.raises(ValueError, match=f"left_out: the choice of the {name} router is f"):
            layer.route(x_TD, left_out)
    if ROUTERS[name].masks_best:
        best, masked = ids(NONE), ids(Intervention(mask_best=1))
        assert (masked != best[:, :1]).all()
        np.testing.assert_array_equal(masked[:, :-1], best[:, 1:])
    else:
        with pytest.raises(ValueError, match=rf"mask_best=1: the {name} router does not choose"):
            ids(Intervention(mask_best=1))


@pytest.mark.parametrize("name", [n for n, r in ROUTERS.items() if r.needs_recording != "routing"])
def test_in_generation_every_router_routes_each_token_by_itself(name):
    """In a batch of two sequences, and as the only token there is: the same experts and gates."""
    layer = make_layer(
        k=ROUTERS[name].top or K, **{"router.name": name, "router.tasks": tasks_of(name)}
    )
    x_TD = activations().reshape(T, D)

    def route(x_TD, ids_T, sequences_B):
        tokens = RouterInputs(ids_T, sequence_ids_B=sequences_B, task_ids_T=ids_T % len(TASKS))
        return layer.route(x_TD, tokens, intervention=GENERATION)[0]

    together = route(x_TD, jnp.arange(T), jnp.arange(2))
    for t in range(T):
        alone = route(x_TD[t : t + 1], jnp.arange(t, t + 1), jnp.arange(1))
        np.testing.assert_array_equal(together.ids_TK[t], alone.ids_TK[0])
        np.testing.assert_allclose(together.gates_TK[t], alone.gates_TK[0], rtol=1e-5)


def test_in_generation_expert_choice_takes_the_best_of_each_token():
    layer = make_layer(**{"router.name": "expert_choice", "router.routed_scaling_factor": 2.0})
    x_TD = activations().reshape(T, D)
    routing, _ = layer.route(x_TD, RouterInputs(jnp.arange(T)), intervention=GENERATION)
    for x, ids, gates in zip(np.asarray(x_TD), *routing[:2], strict=True):
        chosen, s = numpy_choice(np.asarray(layer.router_ED[...]) @ x, K, 0)
        np.testing.assert_array_equal(ids, chosen)
        np.testing.assert_allclose(gates, 2 * s, rtol=1e-5)


def test_nothing_is_dropped_in_generation():
    layer = make_layer(**{"evaluation_drop.capacity_factor": 0.5})
    ledger = evaluate(layer, GENERATION)[1].logged.ledger
    np.testing.assert_array_equal(ledger.computed_E, ledger.sent_E)
    assert ledger.sent_E.sum() == T * K


@pytest.mark.parametrize(
    ("settings", "intervention", "message"),
    [
        (
            {},
            {"num_experts_per_tok": 7},
            r"num_experts_per_tok=7: .* 6 experts; 0 masked and 7 act",
        ),
        ({}, {"mask_best": 5}, r"mask_best=5: .* 6 experts; 5 masked and 2 activated"),
        (V3, {"mask_best": 3}, r"mask_best=3: .* 4 experts; 3 masked and 2 activated"),
    ],
)
def test_an_intervention_that_leaves_too_few_experts_is_refused(settings, intervention, message):
    layer = make_layer(**settings)
    with pytest.raises(ValueError, match=message):
        evaluate(layer, Intervention(**intervention))


def test_numbers_that_cannot_be():
    with pytest.raises(ValueError, match=r"mask_best=-1: must be >= 0"):
        Intervention(mask_best=-1)
    with pytest.raises(ValueError, match=r"num_experts_per_tok=0: must be > 0, or None"):
        Intervention(num_experts_per_tok=0)


@pytest.mark.parametrize(
    ("settings", "left_out", "message"),
    [
        ({}, [(), (0, 1, 2, 3, 4)], r"left_out of MoE layer 1=\[0, 1, .*\]: a token .* with 1 exp"),
        (V3, [(0, 2), ()], r"left_out of MoE layer 0=\[0, 2\]: .* with 2 exp.*; 1 masked and"),
        (
            {"router.name": "uniform"},
            [(0,), ()],
            r"left_out: .* the uniform router is fixed; must be no ex",
        ),
        ({}, [(0,)], r"layers x experts=\(1, 6\): must be \(2, 6\)"),
    ],
)
def test_experts_that_cannot_be_left_out(settings, left_out, message):
    """With limits to two groups a token may find the two that have one expert each."""
    left_out_LE = np.array([np.isin(np.arange(E), ids) for ids in left_out])
    moe = make_layer(**settings).config
    with pytest.raises(ValueError, match=message):
        check_left_out(left_out_LE, 2, moe, Intervention(mask_best=1 if settings is V3 else 0))


def test_as_many_may_be_left_out_as_leave_k():
    left_out_LE = np.array([np.isin(np.arange(E), ids) for ids in [(0, 1), (0, 2)]])
    check_left_out(left_out_LE, 2, make_layer(**V3).config)
