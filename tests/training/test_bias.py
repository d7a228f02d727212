"""The loss-free balance bias as state: it moves by the global load, gets no gradient, survives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.moe.layer import RouterVariable
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.training.start import abstract_state, from_items, init_state, to_items
from dsmoe_jax.training.step import make_train_step

B, S, V, E, GAMMA = 4, 16, 64, 8, 0.01
BIASED = {
    "model.vocab_size": V,
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.attention.num_attention_heads": 1,
    "model.attention.num_key_value_heads": 1,
    "model.attention.head_dim": 16,
    "model.initializer_range": 0.1,
    "model.moe.n_routed_experts": E,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.moe_intermediate_size": 8,
    "model.moe.router.name": "topk",
    "model.moe.router.scoring_func": "sigmoid",
    "model.moe.router.norm_topk_prob": True,
    "model.moe.router.bias_update_speed": GAMMA,
    "model.moe.balance.expert": None,
    "model.moe.balance.sequence.factor": 1e-4,
    "model.moe.expert_backend": "ragged_dot",
    "data.tokenizer_vocab_size": V,
    "train.global_batch_size": B,
}


@functools.cache
def compiled(**overrides):
    """The initial state (never donated) and the step of a config."""
    config = replace(Config(), **{**BIASED, **overrides})
    return init_state(config), jax.jit(make_train_step(config, jnp.ones(V)))


def batch(seed):
    tokens = np.random.default_rng(seed).integers(0, V, (B, S + 1)).astype(np.int32)
    return {
        "tokens_BS": tokens[:, :-1],
        "targets_BS": tokens[:, 1:],
        "loss_mask_BS": np.ones((B, S), bool),
        "segment_ids_BS": np.ones((B, S), np.int32),
        "positions_BS": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
    }


def bias_of(state):
    (bias_LE,) = jax.tree.leaves(nnx.filter_state(state.other, RouterVariable))
    return np.asarray(bias_LE)


def expected(bias_LE, load_LE):
    """2408.15664 algorithm 1 with the load of the whole batch."""
    return bias_LE + GAMMA * np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_moves_once_a_step_by_the_load_of_the_global_batch(micro_batches):
    state, step = compiled(**{"train.accumulation_steps": micro_batches})
    bias_LE = bias_of(state)
    np.testing.assert_array_equal(bias_LE, np.zeros((2, E)))
    for i in range(3):
        state, metrics = step(state, batch(i))
        load_LE = np.asarray(metrics.router.load_E)
        assert (load_LE.sum(axis=1) == B * S * 2).all()
        bias_LE = expected(bias_LE, load_LE)
        np.testing.assert_allclose(bias_of(state), bias_LE, atol=1e-7)
        assert [*metrics.biases] == [2, 2], "moved, and due"
    assert np.abs(bias_LE).max() > GAMMA, "it moves"


# As V3's: whole, then halved, then none for the rest.
SCHEDULE = ((0, 1), (0.3, 1), (0.3, 0.5), (0.6, 0.5), (0.6, 0), (1, 0))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_its_speed_follows_a_schedule(micro_batches):
    state, step = compiled(
        **{
            "model.moe.router.bias_update_schedule": SCHEDULE,
            "train.accumulation_steps": micro_batches,
            "train.steps": 10,
            "optimizer.warmup_steps": 0,
        }
    )
    seen = []
    for multiple in (1, 1, 1, 0.5, 0.5, 0.5, 0, 0, 0, 0):  # of the steps 1 to 10
        before_LE = bias_of(state)
        state, metrics = step(state, batch(0))
        whole_LE = expected(0, np.asarray(metrics.router.load_E))
        np.testing.assert_allclose(bias_of(state) - before_LE, multiple * whole_LE, atol=1e-8)
        seen.append(bias_of(state))
    assert (seen[6] == seen[9]).all()
    assert (seen[5] != seen[4]).any(), "it moves up to the last part"


def test_accumulation_changes_nothing():
    after = []
    for micro_batches in (1, 2):
        state, step = compiled(**{"train.accumulation_steps": micro_batches})
        state, metrics = step(state, batch(0))
        after.append((bias_of(state), metrics.total_loss, metrics.grad_norm))
    chex.assert_trees_all_close(*after, rtol=1e-5)


def test_is_no_parameter():
    state, _ = compiled()
    assert not jax.tree.leaves(nnx.filter_state(state.params, RouterVariable))
    assert bias_of(state).shape not in [x.shape for x in jax.tree.leaves(state.opt_state)]


def test_evens_the_load():
    """The same skewed batch again and again: the bias alone brings the busy experts down."""
    state, step = compiled()
    params, violations = state.params, []
    for _ in range(60):
        state, metrics = step(state._replace(params=params), batch(0))
        load_LE = np.asarray(metrics.router.load_E)
        violations.append((load_LE.max(axis=1) / load_LE.mean(axis=1) - 1).mean())
    assert violations[0] > 0.5
    assert np.mean(violations[-10:]) < violations[0] / 2


def test_survives_a_checkpoint(tmp_path):
    state, step = compiled()
    state, _ = step(state, batch(0))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, to_items(state), {})
    checkpoints.wait()
    target = to_items(abstract_state(replace(Config(), **BIASED)))
    restored = from_items(checkpoints.restore(1, target).items)
    checkpoints.close()
    chex.assert_trees_all_equal(restored, state)
    np.testing.assert_array_equal(bias_of(restored), bias_of(state))
    assert np.abs(bias_of(restored)).max() > 0


def test_random_routers_draw_anew_each_step_and_the_same_again():
    """All randomness comes from the seed and the step."""
    noisy = {"model.moe.router.name": "noisy_topk", "model.moe.router.scoring_func": "softmax"}
    state, step = compiled(**noisy)
    _, one = step(state, batch(0))
    _, again = step(state, batch(0))
    _, two = step(state._replace(step=state.step + 1), batch(0))
    np.testing.assert_array_equal(one.router.load_E, again.router.load_E)
    assert np.abs(one.router.load_E - two.router.load_E).max() > 0
