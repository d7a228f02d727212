"""Each router against plain numpy, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.routers import ROUTERS, get_router
from dsmoe_jax.moe.routers.fixed import balanced_table, hash_expert
from dsmoe_jax.moe.types import RouterInputs, count_load


def moe_config(e=8, k=3, **kwargs):
    return MoEConfig(n_routed_experts=e, num_experts_per_tok=k, **kwargs)


def numpy_softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


NO_TOKENS = RouterInputs(jnp.zeros(0, jnp.int32))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.booleans())
def test_topk_softmax_is_the_papers_formula(seed, k, renormalise):
    logits = np.random.default_rng(seed).normal(size=(5, 8), scale=3).astype(np.float32)
    config = moe_config(k=k, norm_topk_prob=renormalise, routed_scaling_factor=2.5)
    routing = ROUTERS["topk_softmax"].route(jnp.asarray(logits), NO_TOKENS, config)

    s = numpy_softmax(logits.astype(np.float64))
    chosen = np.argsort(-s, axis=-1, kind="stable")[:, :k]
    gates = np.take_along_axis(s, chosen, axis=-1)
    if renormalise:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(routing.ids_TK, chosen)
    np.testing.assert_allclose(routing.gates_TK, 2.5 * gates, rtol=1e-5)
    np.testing.assert_allclose(routing.affinity_TE, s, rtol=1e-5)


def test_ties_go_to_the_lower_index():
    routing = ROUTERS["topk_softmax"].route(jnp.zeros((4, 8)), NO_TOKENS, moe_config())
    np.testing.assert_array_equal(routing.ids_TK, np.tile([0, 1, 2], (4, 1)))


def test_switch_weighs_by_the_probability_so_the_router_learns():
    config = moe_config(k=1, router="switch")
    logits = jax.random.normal(jax.random.key(0), (6, 8))
    routing = get_router(config).route(logits, NO_TOKENS, config)
    np.testing.assert_allclose(
        routing.gates_TK[:, 0], jax.nn.softmax(logits).max(axis=-1), rtol=1e-6
    )

    def gate_sum(logits):
        return get_router(config).route(logits, NO_TOKENS, config).gates_TK.sum()

    assert jnp.abs(jax.grad(gate_sum)(logits)).max() > 1e-3


def test_hash_sends_a_token_to_the_same_expert_whatever_surrounds_it():
    config = moe_config(k=1, router="hash", expert_balance_factor=0.0)
    tokens = jnp.array([5, 9, 5, 700, 9, 5])
    routing = get_router(config).route(None, RouterInputs(tokens), config)
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


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_load_counts_every_valid_assignment_once(seed, e):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, e, size=(7, 2)).astype(np.int32)
    valid = rng.random(7) < 0.7
    load = count_load(jnp.asarray(ids), e, jnp.asarray(valid))
    np.testing.assert_array_equal(load, np.bincount(ids[valid].reshape(-1), minlength=e))
    assert count_load(jnp.asarray(ids), e).sum() == ids.size


def test_uniform_is_exactly_balanced():
    config = moe_config(k=3, router="uniform")
    routing = get_router(config).route(None, RouterInputs(jnp.zeros(16, jnp.int32)), config)
    np.testing.assert_array_equal(count_load(routing.ids_TK, 8), np.full(8, 6))
    np.testing.assert_allclose(routing.gates_TK.sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router": "topk_sofmax"}, r"model\.moe\.router\.name='topk_sofmax'.*topk_softmax"),
        ({"router": "switch"}, r"num_experts_per_tok=3.*switch.*exactly 1 expert"),
        ({"router": "gshard"}, r"num_experts_per_tok=3.*gshard.*exactly 2 experts"),
        ({"scoring_func": "sigmoid"}, r"scoring_func='sigmoid'.*topk_softmax router.*'topk'"),
        ({"router": "uniform", "bias_update_speed": 0.1}, r"bias_update_speed=0\.1.*uniform"),
        ({"router": "expert_choice", "n_group": 2, "topk_group": 2}, r"n_group=2.*expert_choice"),
        ({"router": "topk", "random_second_expert": True}, r"random_second_expert=True.*gshard"),
        ({"k": 1, "norm_topk_prob": True}, r"norm_topk_prob=True.*learn nothing"),
    ],
)
def test_refusals_name_key_value_and_what_would_be_right(moe, message):
    with pytest.raises(ValueError, match=message):
        get_router(moe_config(**moe))


def test_what_a_router_reads_is_in_the_config():
    for name, router in ROUTERS.items():
        for setting in router.reads:
            assert hasattr(MoEConfig(), setting), f"{name} reads {setting}"
