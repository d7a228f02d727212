"""The router of a fixed table: the table, what it may be combined with, and where it comes from."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.moe.interventions import Intervention, check
from dsmoe_jax.moe.routers import RouterInputs, fixed, get_router
from dsmoe_jax.training import router_state
from tests.tools.routing import moe_config, route
from tests.tools.tiny import tiny


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(0, 10_000), min_size=1, max_size=60),
    sizes=st.sampled_from([(4, 1), (6, 2), (7, 3), (5, 5)]),
)
def test_different_experts_and_loads_apart_by_a_token_at_most(counts, sizes):
    """Whatever the text: no expert has more than another by more than the last token it took."""
    e, k = sizes
    table_VK = fixed.balanced_choices(np.array(counts), e, k, seed=0)
    assert table_VK.shape == (len(counts), k)
    assert all(len(set(experts)) == k for experts in table_VK.tolist())
    load_E = np.zeros(e, int)
    for token in np.argsort(-np.maximum(counts, 1), kind="stable"):
        others = np.setdiff1d(np.arange(e), table_VK[token])
        assert load_E[table_VK[token]].max() <= load_E[others].min(initial=1 << 40)
        load_E[table_VK[token]] += max(counts[token], 1)


def test_rare_tokens_do_not_share_a_few_sets_of_experts():
    table_VK = fixed.balanced_choices(np.ones(400, int), 16, 4, seed=0)
    assert len({tuple(sorted(experts)) for experts in table_VK.tolist()}) > 200
    np.testing.assert_array_equal(np.bincount(table_VK.ravel()), np.full(16, 100))
    other_VK = fixed.balanced_choices(np.ones(400, int), 16, 4, seed=1)
    assert (other_VK != table_VK).any()


def test_the_table_chooses_and_the_scores_weigh():
    """Best first; of what no text has filled, nothing."""
    moe = moe_config("token_table", e=4, k=2, scoring_func="sigmoid", norm_topk_prob=True)
    table_VK = jnp.array([[3, 0], [1, 2], [4, 4]])
    logits = jnp.array([[2.0, 9.0, 9.0, 1.0], [9.0, -1.0, 1.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    found = route(logits, RouterInputs(jnp.arange(3), state={"table_VK": table_VK}), moe)
    np.testing.assert_array_equal(found.ids_TK, [[0, 3], [2, 1], [4, 4]])
    s = 1 / (1 + np.exp(-np.array([[2.0, 1.0], [1.0, -1.0]])))
    np.testing.assert_allclose(found.gates_TK[:2], s / s.sum(axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(found.gates_TK[2], 0)


def test_the_table_comes_from_the_training_text():
    changes = {"router.name": "token_table", "balance": {}, "router.options.seed": 3}
    model = tiny(**{f"model.moe.{key}": value for key, value in changes.items()}).model
    counts = np.arange(7)
    found = router_state.first_values(model, lambda: counts)["table_VK"]
    wanted = np.zeros(model.vocab_size, int)
    wanted[:7] = counts
    np.testing.assert_array_equal(found, fixed.balanced_choices(wanted, 4, 2, seed=3))
    with pytest.raises(ValueError, match="the token_table router needs token counts"):
        router_state.first_values(model, None)


def test_another_k_is_refused():
    moe = dataclasses.replace(moe_config("token_table"), n_shared_experts=1)
    check(Intervention(num_experts_per_tok=2), moe)
    with pytest.raises(ValueError, match=r"tok=3: the token_table router activates exactly 2"):
        check(Intervention(num_experts_per_tok=3), moe)
    assert get_router(moe)[0].own_k
