"""Experts in another order: the same routing by every router, the same outputs of a model."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import replace
from dsmoe_jax.model import layout
from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe.routers import ROUTERS, get_router
from dsmoe_jax.moe.types import RouterInputs
from dsmoe_jax.surgery import permutation
from tests.model.tiny_model import V, config_of
from tests.tools.routing import TASKS
from tests.tools.trees import by_path

E = 8
MOVABLE = {
    "topk": {"router.bias_update_speed": 0.01, "router.n_group": 4, "router.topk_group": 2},
    "switch": {"num_experts_per_tok": 1},
    "gshard": {},
    "noisy_topk": {},
    "dynamic_specialised": {},
    "sinkhorn": {},
    "base": {"num_experts_per_tok": 1},
    "expert_choice": {},
    "reinforce": {},
    "hash": {"num_experts_per_tok": 1, "router.options": {"table": "frequency"}},
    "token_table": {"num_experts_per_tok": 3},
    "task": {"router.tasks": TASKS, "router.bias_update_speed": 0.01},
    "task_table": {"router.tasks": TASKS},
}
REFUSED = {
    "uniform": "chooses experts by their number",
    "replay": "chooses experts by their number",
    "replay_ids": "replays a recording",
}


def config(name, **overrides):
    keys = {"router.name": name, "n_routed_experts": E, "num_experts_per_tok": 2, "balance": {}}
    keys |= MOVABLE.get(name, {}) | overrides
    return config_of(**{f"model.moe.{key}": value for key, value in keys.items()})


def orders_of(model, seed=0, whole=1):
    """A random order for each MoE layer that keeps equal parts together."""
    rng = np.random.default_rng(seed)
    n = sum(layers for _, layers in layout.moe_stacks(model))
    size = model.moe.n_routed_experts // whole

    def one():
        parts = rng.permutation(whole)[:, None] * size
        return (parts + np.stack([rng.permutation(size) for _ in range(whole)])).ravel()

    return [one() for _ in range(n)]


def drawn(shapes, seed=1):
    """Random values for every array; ids below E for those of tables."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if np.issubdtype(x.dtype, np.integer):
            return rng.permuted(np.resize(np.arange(E), x.shape), axis=-1).astype(x.dtype)
        return rng.normal(0, 0.5, x.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def test_every_router_is_listed():
    assert {*MOVABLE, *REFUSED} == {*ROUTERS}


@pytest.mark.parametrize("name", REFUSED)
def test_routers_that_know_numbers_are_refused(name):
    with pytest.raises(ValueError, match=rf"^model\.moe\.router\.name='{name}': {REFUSED[name]}"):
        permutation.check(config(name).model)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"name='hash': chooses experts by their number"):
        permutation.check(config("hash", **{"router.options": {"table": "random"}}).model)
    with pytest.raises(ValueError, match=r"n_routed_experts=0: a dense model has no experts"):
        permutation.check(
            config_of(**{"model.moe.n_routed_experts": 0, "model.moe.num_experts_per_tok": 0,
                         "model.moe.balance": {}}).model
        )  # fmt: skip


@pytest.mark.parametrize("name", MOVABLE)
def test_every_router_chooses_the_same_experts(name):
    """Logits from the moved rows give the moved ids, and the same gates."""
    model = config(name, n_identity_experts=0).model
    permutation.check(model)
    n = sum(layers for _, layers in layout.moe_stacks(model))
    router, found = get_router(model.moe)
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, V, 24)
    layer = {}
    if router.learned:
        layer["router_ED"] = rng.normal(size=(n, router.logits_per_expert * E, 16))
    first = router.state.first(dataclasses.replace(found, vocab_size=V)) if router.state else {}
    layer |= {key: np.broadcast_to(value, (n, *value.shape)) for key, value in first.items()}
    tree = drawn({"layers": {"moe": layer}})
    orders = orders_of(model, whole=model.moe.router.n_group)
    moved = permutation.permuted(model, tree, orders)
    x_TD = rng.normal(size=(24, 16)).astype(np.float32)

    @jax.jit
    def route(tree):
        arrays = {key: value[0] for key, value in tree["layers"]["moe"].items()}
        logits = None
        if router.learned:
            logits = jnp.einsum("td,ed->te", x_TD, arrays.pop("router_ED"), precision="highest")
        inputs = RouterInputs(
            jnp.asarray(tokens), valid_T=jnp.ones(24, bool), state=arrays,
            sequence_ids_B=jnp.arange(2), task_ids_T=jnp.asarray(tokens) % len(TASKS),
        )  # fmt: skip
        return router.route(logits, inputs, found)

    before, after = route(tree), route(moved)
    ids = np.append(orders[0], E)[np.asarray(after.ids_TK)]
    wanted = np.asarray(before.ids_TK)
    if router.all_columns:  # a column for each expert, in their order
        back = np.argsort(ids, axis=1, kind="stable")
        ids, gates = np.take_along_axis(ids, back, 1), np.take_along_axis(after.gates_TK, back, 1)
        forth = np.argsort(wanted, axis=1, kind="stable")
        wanted = np.take_along_axis(wanted, forth, 1)
        gates_before = np.take_along_axis(np.asarray(before.gates_TK), forth, 1)
    else:
        gates, gates_before = after.gates_TK, before.gates_TK
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(gates, gates_before, rtol=1e-5, atol=1e-6)
    assert not (np.asarray(after.ids_TK) == np.asarray(before.ids_TK)).all()


BIASES = {
    "model.moe.expert.name": "gpt_oss",
    "model.moe.router.logits_bias": True,
    "model.moe.router.bias_update_speed": 0.01,
    "model.moe.n_routed_experts": E,
}


def test_a_model_gives_the_same_logits():
    overrides = {
        **BIASES,
        "model.num_hidden_layers": 3,
        "model.moe.router.n_group": 4,
        "model.moe.router.topk_group": 2,
    }
    model = config_of(**overrides).model
    state = drawn(model_shapes(model))
    moved = permutation.permuted(model, state, orders_of(model, whole=4))
    tokens_BS = jax.random.randint(jax.random.key(5), (2, 16), 0, V)
    graph = abstract_model(model)

    @jax.jit
    def logits(state):
        return nnx.merge(graph, *state).forward(ModelInputs(tokens_BS)).logits_BSV

    before, after = logits(state), logits(moved)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
    differs = by_path(jax.tree.map(lambda x, y: (x != y).any(), state, moved))
    of_experts = {path for path in differs if "'moe'" in path and "shared" not in path}
    assert {path for path, other in differs.items() if other} == of_experts


def test_every_layer_has_its_own_order():
    """MoE layers in two runs, and those of multi-token prediction; identity experts stay."""
    overrides = {
        **BIASES,
        "model.num_hidden_layers": 5,
        "model.first_k_dense_replace": 1,
        "model.moe_layer_freq": 2,
        "model.mtp.num_nextn_predict_layers": 1,
        "model.moe.n_identity_experts": 2,
    }
    model = config_of(**overrides).model
    state = drawn(model_shapes(model))
    orders = orders_of(model)
    moved = by_path(permutation.permuted(model, state, orders))
    number = {"layers": 0, "further": 1, "mtp": 2}  # by the first key of a path
    assert len(orders) == 3
    for path, x in by_path(state).items():
        letters = re.search(r"_([A-Z]+)'", path)[1]
        if "'moe'" not in path or letters[0] != "E":
            np.testing.assert_array_equal(moved[path], x)
            continue
        layer = number[re.search(r"'(\w+)'", path)[1]]
        order = np.append(orders[layer], np.arange(E, x.shape[1]))
        np.testing.assert_array_equal(moved[path], x[:, order])


@st.composite
def layers(draw):
    """Sizes of a layer: groups, experts of each, K, D, F."""
    groups = draw(st.sampled_from([1, 2, 3]))
    each = draw(st.integers(2, 4))
    limit = draw(st.integers(1, groups))
    k = draw(st.integers(1, limit * each))
    return groups, each, limit, k, draw(st.integers(1, 5)), draw(st.integers(1, 4))


def numpy_layer(layer, x_TD, groups, limit, k):
    """V3's layer in numpy: sigmoid, bias, groups by their two best, top k, experts one by one."""
    s_TE = 1 / (1 + np.exp(-x_TD @ layer["router_ED"].T))
    choice_TE = s_TE + layer["bias_E"]
    by_group = choice_TE.reshape(len(x_TD), groups, -1)
    score_TG = np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2)
    worst = np.argsort(-score_TG, axis=1)[:, limit:]
    np.put_along_axis(by_group, worst[:, :, None], -np.inf, axis=1)
    y_TD = np.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        for e in np.argsort(-by_group[t].ravel())[:k]:
            gate_F, up_F = layer["gate_EFD"][e] @ x_D, layer["up_EFD"][e] @ x_D
            hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
            y_TD[t] += s_TE[t, e] * (layer["down_EDF"][e] @ hidden_F)
    return y_TD


@given(layers(), st.integers(0, 10**6))
@settings(max_examples=25)
def test_any_size_computes_the_same(sizes, seed):
    """Against a layer in numpy that knows nothing of ours."""
    groups, each, limit, k, d, f = sizes
    e = groups * each
    keys = {"n_routed_experts": e, "num_experts_per_tok": k, "router.n_group": groups}
    keys |= {"router.topk_group": limit, "router.bias_update_speed": 0.1}
    overrides = {f"model.moe.{key}": value for key, value in keys.items()}
    model = config_of(**{"model.num_hidden_layers": 3, **overrides}).model
    rng = np.random.default_rng(seed)
    shapes = {"router_ED": (e, d), "bias_E": (e,), "gate_EFD": (e, f, d), "up_EFD": (e, f, d)}
    shapes["down_EDF"] = (e, d, f)
    layer = {name: rng.normal(size=(1, *shape)) for name, shape in shapes.items()}
    orders = orders_of(model, seed, whole=groups)
    moved = permutation.permuted(model, {"layers": {"moe": layer}}, orders)["layers"]["moe"]
    before, after = ({name: x[0] for name, x in arrays.items()} for arrays in (layer, moved))
    x_TD = rng.normal(size=(6, d))
    wanted = numpy_layer(before, x_TD, groups, limit, k)
    np.testing.assert_allclose(numpy_layer(after, x_TD, groups, limit, k), wanted, rtol=1e-9)


def test_loads_and_trained_experts_move_along():
    orders = [np.array([2, 0, 1]), np.array([1, 2, 0])]
    load_LE = np.array([[5, 6, 7, 100], [8, 9, 10, 100]])
    moved = permutation.permuted_load(load_LE, orders)
    assert moved.tolist() == [[7, 5, 6, 100], [9, 10, 8, 100]]
    chosen = {"train.trainable.part": "chosen_experts", "train.trainable.experts": ((0, 2), (1,))}
    moved = permutation.permuted_config(replace(config("topk"), **chosen), orders)
    assert moved.train.trainable.experts == ((0, 1), (0,))
