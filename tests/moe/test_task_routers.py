"""Routers by task against numpy: choices, gradients, the table, and what balance terms count.

Shapes: T tokens, E experts, K activated, A tasks, D hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import BalanceTerm, MoEConfig, RouterConfig
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routers import RouterInputs, fixed, get_router, task_number
from dsmoe_jax.moe.types import MoEInputs
from tests.tools.routing import TASKS, moe_config, route

E, K, A, T, D = 7, 3, len(TASKS), 12, 8
TASK_T = np.array([0, 0, 2, 2, 2, 1, 0, 1, 1, 1, 2, 0])


def make_layer(name="task", **section):
    section = {"tasks": TASKS, **section}
    moe = MoEConfig(
        n_routed_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=4,
        router=RouterConfig(name, **section),
        balance=FrozenDict(),
        expert_backend="loop",
    )
    return MoELayer(moe, hidden_size=D, vocab_size=9, initializer_range=1.0, rngs=nnx.Rngs(0))


def softmax(z):
    s = np.exp(z - z.max(axis=-1, keepdims=True))
    return s / s.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("normalised", [False, True])
def test_choices_and_gates_are_those_of_the_task_whatever_the_token(normalised):
    """And their gradient, from which the tasks' logits learn: by hand, summed over its tokens."""
    layer = make_layer(norm_topk_prob=normalised)
    inputs = RouterInputs(jnp.zeros(T, jnp.int32), task_ids_T=jnp.asarray(TASK_T))
    weight_TK = np.random.default_rng(1).normal(size=(T, K)).astype(np.float32)
    graph, params, other = nnx.split(layer, nnx.Param, ...)

    def loss(params, x_TD):
        routing = nnx.merge(graph, params, other).route(x_TD, inputs)[0]
        return (routing.gates_TK * weight_TK).sum(), routing

    x_TD = jax.random.normal(jax.random.key(3), (T, D))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, routing), (of_params, of_x_TD) = run(params, x_TD)
    logits_AE = np.asarray(layer.router_EA[...]).T
    s_AE = softmax(logits_AE)
    ids_AK = np.argsort(-s_AE, axis=1)[:, :K]
    gates_AK = np.take_along_axis(s_AE, ids_AK, axis=1)
    of_gates_AKE = gates_AK[:, :, None] * (np.eye(E)[ids_AK] - s_AE[:, None])
    if normalised:
        share_AK = gates_AK / gates_AK.sum(axis=1, keepdims=True)
        chosen_AKE = np.eye(E)[ids_AK]
        mean_AE = np.einsum("ak,ake->ae", share_AK, chosen_AKE)
        gates_AK = share_AK
        of_gates_AKE = share_AK[:, :, None] * (chosen_AKE - mean_AE[:, None])
    np.testing.assert_array_equal(routing.ids_TK, ids_AK[TASK_T])
    np.testing.assert_allclose(routing.gates_TK, gates_AK[TASK_T], rtol=1e-5)
    np.testing.assert_allclose(routing.affinity_TE, s_AE[TASK_T], rtol=1e-5)
    wanted_AE = np.zeros((A, E))
    np.add.at(wanted_AE, TASK_T, np.einsum("tk,tke->te", weight_TK, of_gates_AKE[TASK_T]))
    np.testing.assert_allclose(of_params["router_EA"][...].T, wanted_AE, rtol=1e-4, atol=1e-6)
    assert not np.asarray(of_x_TD).any(), "the token says nothing"


@settings(max_examples=20)
@given(a=st.integers(2, 12), e=st.integers(1, 12), k=st.integers(1, 12), z=st.integers(0, 2))
def test_the_table_is_even_in_tasks(a, e, k, z):
    """K different experts of each task, none of them an identity expert."""
    k = min(k, e)
    moe = moe_config("task_table", e=e, k=k, tasks=tuple(f"t{i}" for i in range(a)))
    moe = dataclasses.replace(moe, n_identity_experts=z)
    _, found = get_router(moe)
    table_AK = np.asarray(fixed.first_task_table(found)["table_AK"])
    assert table_AK.shape == (a, k)
    assert all(len(set(row)) == k for row in table_AK.tolist())
    tasks_E = np.bincount(table_AK.ravel(), minlength=e)
    assert len(tasks_E) == e
    assert tasks_E.max() - tasks_E.min() <= 1


def test_the_table_decides():
    moe = moe_config("task_table", e=E, k=K, tasks=TASKS, routed_scaling_factor=0.5)
    table_AK = jnp.array([[6, 0, 3], [1, 2, 4], [5, 0, 1]])
    inputs = RouterInputs(
        jnp.zeros(T, jnp.int32), state={"table_AK": table_AK}, task_ids_T=jnp.asarray(TASK_T)
    )
    found = route(None, inputs, moe)
    np.testing.assert_array_equal(found.ids_TK, np.asarray(table_AK)[TASK_T])
    np.testing.assert_array_equal(found.gates_TK, 0.5)


def balance(scope, logits_AE, task_ids_BS):
    """The expert term of a layer of two experts, one of them for each token."""
    moe = MoEConfig(
        n_routed_experts=2,
        num_experts_per_tok=1,
        router=RouterConfig("task", tasks=("a", "b")),
        balance=FrozenDict(expert=BalanceTerm(1.0, scope)),
    )
    router, found = get_router(moe)

    def value(logits_AE):
        tokens_T = jnp.zeros(task_ids_BS.size, jnp.int32)
        routing = router.route(logits_AE[task_ids_BS.reshape(-1)], RouterInputs(tokens_T), found)
        devices = losses.Devices(n=1, limit=1)
        segments_BS = jnp.ones(task_ids_BS.shape, jnp.int32)
        part = losses.sums("expert", routing, segments_BS, scope, devices)
        return losses.value("expert", part, losses.whole_batch(segments_BS))

    return jax.jit(jax.value_and_grad(value))(logits_AE)


def test_a_sequence_of_one_task_is_never_even():
    """Two tasks with an expert each: even over the batch, and twice as much as that in each row.

    By hand: f of a row is 2 for its expert, so that its affinity s counts twice.  Over the batch f
    is 1 for both, and no logit has a gradient.
    """
    logits_AE = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    task_ids_BS = jnp.array([[0] * 4, [1] * 4])
    s = float(jax.nn.sigmoid(2.0))
    found, gradient_AE = balance("sequence", logits_AE, task_ids_BS)
    np.testing.assert_allclose(found, 2 * s, rtol=1e-6)
    assert np.abs(gradient_AE).min() > 0.05
    found, gradient_AE = balance("global_batch", logits_AE, task_ids_BS)
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)
    np.testing.assert_allclose(gradient_AE, 0, atol=1e-7)
    both = jnp.array([[1.0, -1.0], [1.0, -1.0]])  # both tasks with the first expert
    _, gradient_AE = balance("global_batch", both, task_ids_BS)
    assert (gradient_AE[:, 0] > 0.05).all(), "which is pushed away"


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        ("task", {"tasks": ()}, r"^model\.moe\.router\.tasks=\(\): the task router chooses by"),
        ("task_table", {"tasks": ("a",)}, r"tasks=\('a',\): the task_table router .* two or more"),
        ("topk", {}, r"router\.tasks=.*: the topk router does not know it"),
        ("task", {"tasks": ("a", "a")}, r"router\.tasks=\('a', 'a'\): must be different names"),
        ("task", {"jitter": 0.1}, r"jitter=0\.1: the task router does not know it"),
        ("task", {"logits_bias": True}, r"logits_bias=True: the task router does not know it"),
        ("task_table", {"norm_topk_prob": True}, r"norm_topk_prob=True: the task_table router"),
    ],
)
def test_what_cannot_be_is_refused(name, section, message):
    with pytest.raises(ValueError, match=message):
        make_layer(name, **section)


def test_a_text_without_a_task_is_refused():
    layer = make_layer()
    x_BSD = jnp.zeros((1, 4, D))
    inputs = MoEInputs(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))
    message = r"^model\.moe\.router\.name='task': .* not known here; must be one of en, de, code$"
    with pytest.raises(ValueError, match=message):
        layer(x_BSD, inputs)


def test_names_of_tasks():
    moe = moe_config("task", tasks=("en", "en_news", "code"))
    names = {"en": 0, "en_drama": 0, "en_news": 1, "en_news_old": 1, "code_c": 2}
    assert {name: task_number(moe, name, "--task") for name in names} == names
    for name in ("english", "de", "e", ""):
        with pytest.raises(ValueError, match=rf"^--task='{name}': must be one of en, en_news, "):
            task_number(moe, name, "--task")
    with pytest.raises(ValueError, match=r"^--task: missing; the task router .* one of en, en_"):
        task_number(moe, None, "--task")
    assert task_number(moe_config(), None, "--task") is None
    with pytest.raises(ValueError, match=r"^--task='en': has no meaning for this model"):
        task_number(moe_config(), "en", "--task")
