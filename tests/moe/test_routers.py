"""Each router against plain numpy, its variables, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import Config, RouterConfig, replace
from dsmoe_jax.config.trees import known_keys
from dsmoe_jax.moe.routers import ROUTERS, RouterSettings, get_router, scored
from dsmoe_jax.moe.routers.fixed import balanced_table, hash_expert
from dsmoe_jax.moe.schedules import Progress
from dsmoe_jax.moe.types import RouterInputs, count_load
from tests.tools.routing import moe_config, route, tasks_of


def numpy_softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


NOW = Progress(jnp.int32(0), 10)
NO_TOKENS = RouterInputs(jnp.zeros(0, jnp.int32))


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 4), st.booleans())
def test_topk_is_the_papers_formula(seed, k, renormalise):
    logits = np.random.default_rng(seed).normal(size=(5, 8), scale=3).astype(np.float32)
    section = RouterConfig(norm_topk_prob=renormalise, routed_scaling_factor=2.5)
    routing = ROUTERS["topk"].route(
        jnp.asarray(logits), NO_TOKENS, RouterSettings(section, n_experts=8, k=k)
    )

    s = numpy_softmax(logits.astype(np.float64))
    chosen = np.argsort(-s, axis=-1, kind="stable")[:, :k]
    gates = np.take_along_axis(s, chosen, axis=-1)
    if renormalise:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(routing.ids_TK, chosen)
    np.testing.assert_allclose(routing.gates_TK, 2.5 * gates, rtol=1e-5)
    np.testing.assert_allclose(routing.affinity_TE, s, rtol=1e-5)


def test_ties_go_to_the_lower_index():
    routing = route(jnp.zeros((4, 8)), NO_TOKENS, moe_config(k=3))
    np.testing.assert_array_equal(routing.ids_TK, np.tile([0, 1, 2], (4, 1)))


def test_switch_weighs_by_the_probability_so_the_router_learns():
    config = moe_config("switch", k=1)
    logits = jax.random.normal(jax.random.key(0), (6, 8))
    routing = route(logits, NO_TOKENS, config)
    np.testing.assert_allclose(
        routing.gates_TK[:, 0], jax.nn.softmax(logits).max(axis=-1), rtol=1e-6
    )

    def gate_sum(logits):
        return route(logits, NO_TOKENS, config).gates_TK.sum()

    assert jnp.abs(jax.grad(gate_sum)(logits)).max() > 1e-3


def test_hash_sends_a_token_to_the_same_expert_whatever_surrounds_it():
    config = moe_config("hash", k=1)
    tokens = jnp.array([5, 9, 5, 700, 9, 5])
    routing = route(None, RouterInputs(tokens), config)
    np.testing.assert_array_equal(routing.ids_TK[:, 0] == routing.ids_TK[0, 0], tokens == 5)
    np.testing.assert_array_equal(routing.gates_TK, np.ones((6, 1)))
    assert routing.affinity_TE is None


@pytest.mark.parametrize("seed", [0, 1, 123456])
def test_hash_spreads_the_vocabulary_evenly(seed):
    load = np.bincount(hash_expert(jnp.arange(8192), 16, seed), minlength=16)
    # A fair 16-sided die thrown 8192 times has a standard deviation of about 22.
    assert np.abs(load - 512).max() < 5 * 22
    other = hash_expert(jnp.arange(8192), 16, seed + 1)
    assert np.mean(other == hash_expert(jnp.arange(8192), 16, seed)) < 0.1


def greedy_table(counts, n_experts):
    """2106.04426 section 3.1 in the plainest way."""
    load, table = [0] * n_experts, {}
    for token in sorted(range(len(counts)), key=lambda v: (-max(counts[v], 1), v)):
        table[token] = load.index(min(load))
        load[table[token]] += max(counts[token], 1)
    return [table[v] for v in range(len(counts))]


def test_the_table_by_frequency_is_even_on_the_text_it_was_made_for():
    counts = (5e4 / np.arange(1, 2001)).astype(int)  # Zipf's law,
    counts[-300:] = 0  # and tokens that were never seen
    counts = np.random.default_rng(0).permutation(counts)
    table = balanced_table(counts, 16)
    np.testing.assert_array_equal(table, greedy_table(counts.tolist(), 16))

    def maxvio(table):
        load = np.bincount(table, weights=counts, minlength=16)
        return load.max() / load.mean() - 1

    most_frequent_alone = counts.max() / (counts.sum() / 16) - 1
    assert maxvio(table) < max(most_frequent_alone, 0) + 0.01
    assert maxvio(np.asarray(hash_expert(jnp.arange(2000), 16, 0))) > maxvio(table) + 0.1
    assert len(set(table[counts == 0])) > 8, "tokens never seen are spread"


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_load_counts_every_valid_assignment_once(seed, e):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, e, size=(7, 2)).astype(np.int32)
    valid = rng.random(7) < 0.7
    load = count_load(jnp.asarray(ids), e, jnp.asarray(valid))
    np.testing.assert_array_equal(load, np.bincount(ids[valid].reshape(-1), minlength=e))
    assert count_load(jnp.asarray(ids), e).sum() == ids.size


def test_uniform_is_exactly_balanced():
    config = moe_config("uniform", k=3)
    routing = route(None, RouterInputs(jnp.zeros(16, jnp.int32)), config)
    np.testing.assert_array_equal(count_load(routing.ids_TK, 8), np.full(8, 6))
    np.testing.assert_allclose(routing.gates_TK.sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("topk_sofmax", {}, r"model\.moe\.router\.name='topk_sofmax'.*'topk'"),
        ("switch", {"k": 3}, r"num_experts_per_tok=3.*switch.*exactly 1 expert"),
        ("gshard", {"k": 3}, r"num_experts_per_tok=3.*gshard.*exactly 2 experts"),
        (
            "dynamic_specialised",
            {"scoring_func": "sigmoid"},
            r"router\.scoring_func='sigmoid'.*dynamic_specialised router does not.*'topk'",
        ),
        ("uniform", {"bias_update_speed": 0.1}, r"bias_update_speed=0\.1.*uniform.*be None, or"),
        ("expert_choice", {"n_group": 2, "topk_group": 2}, r"n_group=2.*expert_choice"),
        ("topk", {"k": 1, "norm_topk_prob": True}, r"norm_topk_prob=True.*learn nothing"),
    ],
)
def test_refusals_name_key_value_and_what_would_be_right(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_router(moe_config(name, **settings))


@pytest.mark.parametrize(
    ("name", "k", "options", "message"),
    [
        # Of another router, of none, and misspelt.
        ("topk", 2, {"random_second_expert": True}, r"second_expert=True: the topk .*it has \[\]"),
        ("sinkhorn", 2, {"entropy_factor": 0.1}, r"entropy_factor=0\.1: .*has \['iterations'\]"),
        ("sinkhorn", 2, {"iteration": 3}, r"options\.iteration=3: .*did you mean iterations\?"),
        # Of the wrong type, or a wrong value of the right type.
        ("sinkhorn", 2, {"iterations": 2.5}, r"options\.iterations=2\.5: must be of type int"),
        ("sinkhorn", 2, {"iterations": True}, r"options\.iterations=True: must be of type int"),
        ("gshard", 2, {"random_second_expert": 1}, r"second_expert=1: must be of type bool"),
        ("sinkhorn", 2, {"iterations": -1}, r"options\.iterations=-1: must be finite and >= 0"),
        (
            "reinforce",
            2,
            {"entropy_factor": np.nan},
            r"entropy_factor=nan: must be finite and >= 0",
        ),
        ("hash", 1, {"table": 3}, r"model\.moe\.router\.options\.table=3: must be of type str"),
        ("hash", 1, {"table": "even"}, r"options\.table='even': .*\('random', 'frequency'\)"),
    ],
)
def test_options_are_those_of_the_router(name, k, options, message):
    def build():
        router, found = get_router(moe_config(name, k=k, options=options))
        return router.state.first(found)  # a table's name is looked at where the table is made

    with pytest.raises(ValueError, match=message):
        build()


def test_options_have_defaults_and_a_whole_number_is_a_number():
    _, found = get_router(moe_config("reinforce", options={"entropy_factor": 1}))
    assert found.option("entropy_factor") == 1.0
    _, found = get_router(moe_config("reinforce"))
    assert found.option("entropy_factor") == 0.0
    _, found = get_router(moe_config("hash", k=1, options={"seed": 5}))
    assert (found.option("seed"), found.option("table")) == (5, "random")


def test_what_a_router_reads_is_in_the_config():
    """And every router's options can be set by their dotted keys."""
    fields = {field.name for field in dataclasses.fields(RouterConfig)}
    keys = set(known_keys(Config))
    for name, router in ROUTERS.items():
        assert router.reads <= fields - {"name", "options"}, name
        assert {f"model.moe.router.{field}" for field in router.reads} <= keys
        dotted = {f"model.moe.router.options.{option}": v for option, v in router.options.items()}
        config = replace(Config(), **{"model.moe.router.name": name}, **dotted)
        assert config.model.moe.router.options == router.options


@pytest.mark.parametrize("name", list(ROUTERS))
def test_variables_are_there_when_a_setting_asks_for_them(name):
    """Nothing by default; a bias for each expert, all 0, or a table in which all is unassigned."""
    router = ROUTERS[name]

    def first(**section):
        section["tasks"] = tasks_of(name)
        _, found = get_router(moe_config(name, k=router.top or 2, **section))
        return router.state.first(dataclasses.replace(found, vocab_size=20))

    if router.state is None:
        assert "bias_update_speed" not in router.reads
        return
    if router.own_k and router.by_task:
        np.testing.assert_array_equal(first()["table_AK"], [[0, 1], [2, 3], [4, 5]])
        return
    if router.own_k:
        np.testing.assert_array_equal(first()["table_VK"], np.full((20, 2), 8))
        return
    assert first() == {}
    if "bias_update_speed" in router.reads:
        np.testing.assert_array_equal(first(bias_update_speed=1e-3)["bias_E"], np.zeros(8))
        np.testing.assert_array_equal(first(bias_update_speed=0.0)["bias_E"], np.zeros(8))
    if "table" in router.options:
        table_V = first(options={"table": "frequency"})["table_V"]
        np.testing.assert_array_equal(table_V, np.full(20, 8))


def test_the_bias_moves_by_its_speed_towards_an_even_load():
    """2408.15664 algorithm 1, layer by layer; at the mean it stays."""
    router, found = get_router(moe_config(e=4, bias_update_speed=0.5))
    before_LE = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.0, 2.0]])
    load_LE = jnp.array([[9.0, 1.0, 5.0, 5.0], [0.0, 0.0, 0.0, 8.0]])
    after = router.state.after_step({"bias_E": before_LE}, load_LE, NOW, found)
    want_LE = [[-0.5, 0.5, 0.0, 0.0], [1.5, -0.5, 0.5, 1.5]]
    np.testing.assert_array_equal(after["bias_E"], want_LE)
    at_mean = router.state.after_step(
        {"bias_E": jnp.zeros((1, 4))}, jnp.array([[3.0, 2.0, 2.0, 1.0]]), NOW, found
    )
    np.testing.assert_array_equal(at_mean["bias_E"], [[-0.5, 0.0, 0.0, 0.5]])
    _, still = get_router(moe_config(e=4))
    assert router.state.after_step({}, load_LE, NOW, still) == {}


@pytest.mark.parametrize(("e", "mean"), [(63, 100), (7, 3), (200, 2**23 - 99), (256, 1)])
def test_an_expert_at_the_mean_does_not_move(e, mean):
    """Against Python's integers: the mean is seldom a float32, and E * load may pass 2^31."""
    load_LE = np.full((20, e), mean)
    moved = np.random.default_rng(e).integers(1, min(mean, 50) + 1, (20, e // 4))
    load_LE[:, : e // 4] += moved
    load_LE[:, -(e // 4) :] -= moved  # the others are at the mean,
    load_LE[10:, 0] += 1  # or in half of the layers a part of an assignment below it
    load_LE[-1] = 2**24 * (np.arange(e) == 1)  # all go to one expert
    want = np.array([[np.sign(sum(load_E) - e * n) for n in load_E] for load_E in load_LE.tolist()])
    assert (want[:10] == 0).sum() >= 10 * (e // 2)
    got = jax.jit(scored.below_mean)(jnp.asarray(load_LE, jnp.float32))
    np.testing.assert_array_equal(got, want)


def test_the_table_is_made_from_the_counts_of_the_training_text():
    """And tokens go where it says."""
    counts_V = np.array([1, 50, 7, 7, 20, 0])
    moe = moe_config("hash", e=3, k=1, options={"table": "frequency"})
    router, found = get_router(moe)
    variables = router.state.from_token_counts(counts_V, found)
    np.testing.assert_array_equal(variables["table_V"], greedy_table(counts_V.tolist(), 3))
    tokens = jnp.array([4, 1, 1, 0])
    routing = route(None, RouterInputs(tokens, state=variables), moe)
    np.testing.assert_array_equal(routing.ids_TK[:, 0], variables["table_V"][tokens])
    _, random = get_router(moe_config("hash", e=3, k=1))
    assert router.state.from_token_counts(counts_V, random) == {}
