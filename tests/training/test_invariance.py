"""The gradient of every balance term at a fixed scope does not depend on how the batch is computed.

All terms are in one compiled function, in which their weights are arguments.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import Config, replace
from dsmoe_jax.config.moe import SCOPES
from dsmoe_jax.moe import losses
from dsmoe_jax.training.micro_batches import BatchGradient
from dsmoe_jax.training.start import init_state
from tests.tools.trees import REORDERED, assert_all_below, by_path, relative_errors

FAST = {"xla_cpu_use_fusion_emitters": False}  # compiles in a third of the time
B, S, V, E = 8, 16, 64, 8
ALL_TERMS = {
    "model.vocab_size": V,
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.attention.num_attention_heads": 2,
    "model.attention.num_key_value_heads": 2,
    "model.attention.head_dim": 8,
    "model.initializer_range": 0.1,
    "model.moe.n_routed_experts": E,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.router.n_group": 4,
    "model.moe.router.topk_group": 2,
    "model.moe.router.group_score": "top2_sum",  # so that the best scores are not all chosen
    "model.moe.expert_groups": 4,
    "model.moe.moe_intermediate_size": 8,
    "model.moe.expert_backend": "loop",
    **{f"model.moe.balance.{name}.factor": 1.0 for name in losses.TERMS},
    "data.tokenizer_vocab_size": V,
    "train.global_batch_size": B,
}


def batch():
    """Two documents a sequence; one sequence is padded and one is nothing but padding.

    Most tokens are the same, so that the load is uneven: with f = 1 there would be no gradient, and
    with f near 1 little of it but rounding.
    """
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((B, S + 1)) < 0.7, 7, rng.integers(0, V, (B, S + 1)))
    tokens = tokens.astype(np.int32)
    valid = np.ones((B, S), bool)
    valid[1, 5:] = valid[6] = False
    return {
        "tokens_BS": tokens[:, :-1],
        "targets_BS": tokens[:, 1:],
        "loss_mask_BS": valid.astype(np.float32),
        "segment_ids_BS": (np.where(np.arange(S) < 9, 1, 2) * valid).astype(np.int32),
        "positions_BS": np.tile(np.arange(S, dtype=np.int32) % 9, (B, 1)),
    }


def config_of(scope, micro_batches):
    scopes = {
        f"model.moe.balance.{name}.scope": scope
        for name, line in losses.TERMS.items()
        if scope in line.scopes
    }
    return replace(Config(), **ALL_TERMS, **scopes, **{"train.accumulation_steps": micro_batches})


@functools.cache
def initial_state():
    return init_state(config_of("sequence", 1))


@functools.cache
def compiled(scope, micro_batches):
    gradient = BatchGradient(config_of(scope, micro_batches), jnp.ones(V))
    return jax.jit(gradient, compiler_options=FAST)


def gradients(scope, term, micro_batches, inputs=None):
    """The gradient with a weight on one term, far above the language model's, and the totals."""
    state, inputs = initial_state(), inputs or batch()
    weights = {name: jnp.float32(1e3 * (name == term)) for name in losses.TERMS}
    run = compiled(scope, micro_batches)
    found = run(state.params, state.other, inputs, jax.random.key(0), weights)
    return by_path(jax.device_get(found.params)), found.totals


@pytest.mark.parametrize("micro_batches", [2, 8])
@pytest.mark.parametrize("scope", SCOPES)
def test_over_micro_batches(scope, micro_batches):
    for term in losses.TERMS:
        want, whole = gradients(scope, term, 1)
        got, totals = gradients(scope, term, micro_batches)
        assert_all_below(relative_errors(got, want), REORDERED)
        np.testing.assert_array_equal(totals.router.load_E, whole.router.load_E)
        chex.assert_trees_all_close(totals.terms, whole.terms, rtol=REORDERED)
        chex.assert_trees_all_close(totals.parts, whole.parts, rtol=REORDERED)
        chex.assert_trees_all_close(totals.total_loss, whole.total_loss, rtol=REORDERED)
        token_sums = totals.router.token_sums, whole.router.token_sums
        chex.assert_trees_all_close(*token_sums, rtol=REORDERED)


def packed_and_apart():
    """The same eight documents: two a row in four rows, and in rows of their own, with padding."""
    packed = {name: x_BS.copy() for name, x_BS in batch().items()}
    for name in ("loss_mask_BS", "segment_ids_BS"):
        packed[name][:] = 0  # so also are the other four rows
    packed["segment_ids_BS"][:4] = np.where(np.arange(S) < 9, 1, 2)
    packed["loss_mask_BS"][:4] = 1
    apart = {name: np.zeros_like(x_BS) for name, x_BS in packed.items()}
    for name, x_BS in packed.items():
        apart[name][:4, :9] = x_BS[:4, :9]
        apart[name][4:, : S - 9] = x_BS[:4, 9:]
    apart["segment_ids_BS"] = np.minimum(apart["segment_ids_BS"], 1)
    return packed, apart


def test_documents_of_one_row_are_those_of_rows_of_their_own():
    """In scope `document`; in scope `sequence` they are one."""
    packed, apart = packed_and_apart()
    for term in losses.TERMS:
        want, whole = gradients("document", term, 1, apart)
        for micro_batches in (1, 2):
            got, totals = gradients("document", term, micro_batches, packed)
            assert_all_below(relative_errors(got, want), 5e-6)
            chex.assert_trees_all_close(totals.terms, whole.terms, rtol=5e-6)
    in_rows = gradients("sequence", "expert", 1, packed)[1].terms["expert"]
    assert np.abs(in_rows - whole.terms["expert"]).min() > 1e-3


def test_the_terms_move_the_router_and_differ():
    """No term's gradient is nothing, and none is another's; nor are two scopes the same."""
    router = "['layers']['moe']['router_ED'].value"
    found = {
        (scope, term): gradients(scope, term, 1)[0][router]
        for scope in SCOPES
        for term in losses.TERMS
    }
    # That term has no scope `global_batch`, and keeps its own.
    same = {("global_batch", "sequence"), ("sequence", "sequence")}
    for a in found:
        assert np.linalg.norm(found[a]) > 0.1, a
        for b in found:
            if a != b and not {a, b} <= same:
                assert np.linalg.norm(found[a] - found[b]) > 1e-3 * np.linalg.norm(found[a]), (a, b)
