"""One training step: its numbers, the update it makes, and that micro-batches change nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.training.start import init_state
from dsmoe_jax.training.step import jit_train_step, make_train_step
from tests.tools.tiny import tiny
from tests.tools.trees import REORDERED, assert_all_below, by_path, relative_errors

B, S, V = 4, 64, 512
GOLDEN = {"loss": 6.248553, "total_loss": 6.272792, "grad_norm": 0.681197}


def synthetic_batch(padding: int = 0):
    """Tokens by formula (no text: that of the standard library changes with Python)."""
    index_BS = np.arange(B * S).reshape(B, S)
    tokens_BS = (index_BS * index_BS * 31 + index_BS * 7) % V
    valid_BS = np.ones((B, S), bool)
    valid_BS[1, S - padding :] = False
    segments_BS = np.where(np.arange(S) < 40, 1, 2) * valid_BS
    return {
        "tokens_BS": tokens_BS.astype(np.int32),
        "targets_BS": np.roll(tokens_BS, -1, axis=1).astype(np.int32),
        "segment_ids_BS": segments_BS.astype(np.int32),
        "positions_BS": np.tile(np.arange(S) % 40, (B, 1)).astype(np.int32),
        "loss_mask_BS": valid_BS.astype(np.float32),
    }


@functools.cache
def initial_state():
    """The same for all configs of this file: they differ in what the step does."""
    return init_state(tiny())


@functools.cache
def one_step(padding: int = 0, **overrides):
    """State before, state after and metrics of the first step of a tiny model."""
    config, before = tiny(**overrides), initial_state()
    after, metrics = jax.jit(make_train_step(config, jnp.ones(V)))(before, synthetic_batch(padding))
    return config, before, after, metrics


def leaves(tree):
    return by_path(jax.device_get(tree))


def adam(state):
    (found,) = [s for s in state.opt_state[1] if hasattr(s, "mu")]
    return found


def test_golden_first_step():
    _, _, _, metrics = one_step()
    for name, value in GOLDEN.items():
        np.testing.assert_allclose(
            float(getattr(metrics, name)),
            value,
            rtol=2e-5,
            err_msg=(
                f"{name} of the first step has changed.  This may only happen with a change that is"
                " meant to change results (initialisation, architecture, loss, or the order of"
                " random numbers); say so in the commit message and put the new number here.  A"
                " refactor must not change it."
            ),
        )


def test_the_update_is_adamw():
    """Clipping, moments, decay and learning rate, in numpy, from the gradient in the moments."""
    config, before, after, metrics = one_step(**{"optimizer.clip_norm": 0.05})
    o, moments = config.optimizer, adam(after)
    assert float(metrics.grad_norm) > o.clip_norm, "clipping is at work"
    grads = {k: m / (1 - o.b1) for k, m in leaves(moments.mu).items()}
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values()))
    np.testing.assert_allclose(norm, o.clip_norm, rtol=1e-5)
    rate = o.peak_learning_rate / 2  # of the first of two warm-up steps
    np.testing.assert_allclose(float(metrics.learning_rate), rate, rtol=1e-6)
    nu, old, new = leaves(moments.nu), leaves(before.params), leaves(after.params)
    assert grads.keys() == old.keys() == nu.keys()
    for key, g in grads.items():
        np.testing.assert_allclose(nu[key], (1 - o.b2) * g**2, rtol=1e-4, atol=1e-12)
        decay = 0.0 if "scale" in key else o.weight_decay * old[key]
        expected = old[key] - rate * (g / (np.abs(g) + o.eps) + decay)
        np.testing.assert_allclose(new[key], expected, rtol=1e-4, atol=2e-5, err_msg=key)


def test_every_parameter_gets_a_gradient_and_moves():
    _, before, after, _ = one_step()
    old, new, mu = leaves(before.params), leaves(after.params), leaves(adam(after).mu)
    assert int(after.step) == 1
    assert int(adam(after).count) == 1
    for key in old:
        assert mu[key].shape == old[key].shape
        assert np.abs(mu[key]).max() > 0, key
        assert not np.array_equal(old[key], new[key]), key


def test_the_returned_state_is_the_one_that_counts():
    """Two steps from a state differ from one step twice: the update is in what is returned."""
    config, before, after, first = one_step()
    step = jax.jit(make_train_step(config, jnp.ones(V)))
    _, again = step(before, synthetic_batch())
    _, second = step(after, synthetic_batch())
    assert float(again.loss) == float(first.loss)
    assert float(second.loss) < float(first.loss)


@pytest.mark.parametrize(("padding", "micro_batches"), [(0, (2, 4)), (30, (4,))])
def test_accumulation_changes_no_gradient(padding, micro_batches):
    """Gradients of 1, 2 and 4 micro-batches agree, balance terms included (sequence scope)."""
    strong = {
        "model.moe.balance.expert.factor": 0.5,
        "model.moe.balance.router_z.factor": 0.1,
        "optimizer.clip_norm": 1e9,
    }
    results = [
        one_step(padding, **strong, **{"train.accumulation_steps": n}) for n in micro_batches
    ]
    _, _, whole, metrics = one_step(padding, **strong)
    router = "['layers']['moe']['router_ED'].value"
    reference = leaves(adam(whole).mu)
    assert np.abs(reference[router]).max() > 0
    for _, _, state, other in results:
        assert_all_below(relative_errors(leaves(adam(state).mu), reference), REORDERED)
        np.testing.assert_allclose(other.total_loss, metrics.total_loss, rtol=REORDERED)
        np.testing.assert_array_equal(other.router.load_E, metrics.router.load_E)
        chex.assert_trees_all_close(other.parts, metrics.parts, rtol=REORDERED)
        chex.assert_trees_all_close(other.terms, metrics.terms, rtol=REORDERED)
        token_sums = other.router.token_sums, metrics.router.token_sums
        chex.assert_trees_all_close(*token_sums, rtol=REORDERED)


def test_balance_terms_reach_the_router():
    """Without the terms the router's gradient is another one (it never flowed in one trainer)."""
    off = {"model.moe.balance.expert": None, "model.moe.balance.router_z": None}
    key = "['layers']['moe']['router_ED'].value"
    with_terms, without = (leaves(adam(one_step(**o)[2]).mu)[key] for o in ({}, off))
    assert np.linalg.norm(with_terms - without) > 1e-3 * np.linalg.norm(without)


def test_the_weight_of_a_term_follows_its_schedule():
    """From 0 before the first step on, to its factor at the end of the run."""
    ramp = {"model.moe.balance.expert.schedule": ((0.0, 0.0), (1.0, 1.0)),
            "model.moe.balance.router_z": None}  # fmt: skip
    config = tiny(**ramp)
    step = jax.jit(make_train_step(config, jnp.ones(V)))
    for done in (0, 5):
        _, metrics = step(initial_state()._replace(step=jnp.int32(done)), synthetic_batch())
        weighted = done / config.train.steps * 0.01 * metrics.terms["expert"].sum()
        np.testing.assert_allclose(metrics.total_loss - metrics.loss, weighted, atol=1e-5)


def test_entropy_of_a_policy_is_rewarded():
    """The total loss of REINFORCE is less by its mean entropy a token, summed over the layers."""
    policy = {"router.name": "reinforce", "router.options.entropy_factor": 0.7,
              "balance.expert": None, "balance.router_z": None}  # fmt: skip
    _, _, _, metrics = one_step(**{f"model.moe.{key}": value for key, value in policy.items()})
    bonus = 0.7 * metrics.router.token_sums["entropy"].sum() / metrics.tokens
    assert bonus > 1.5, "two layers, each near ln 4"
    np.testing.assert_allclose(metrics.total_loss, metrics.loss - bonus, rtol=1e-5)


def test_the_moments_are_arrays_of_the_state():
    """Adam's moments are created with the parameters, zero before the first step."""
    _, before, _, _ = one_step()
    assert isinstance(before.params, nnx.State)
    assert all(not m.any() for m in leaves(adam(before).mu).values())


def test_a_step_is_traced_once():
    """An argument of another shape or type is refused, and named, instead of compiled for."""
    step = jit_train_step(tiny(), np.ones(V, np.int32))
    state, _ = step(jax.tree.map(jnp.copy, initial_state()), synthetic_batch())
    state, _ = step(state, synthetic_batch())
    changed = synthetic_batch()
    changed["positions_BS"] = changed["positions_BS"].astype(np.int16)
    with pytest.raises(AssertionError, match=r"\['positions_BS'\] was .*int32.*, is .*int16"):
        step(state, changed)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("loss_mask_BS", (B, S - 1)), ("targets_BS", (B - 1, S)), ("replayed_ids_BLSK", (B, 2, 1, 2))],
)
def test_a_batch_of_two_shapes_is_refused(name, shape):
    batch = synthetic_batch()
    if name.startswith("replayed"):
        for other in ("gates", "sent", "chosen"):
            batch[f"replayed_{other}_BLSK"] = np.zeros((B, 2, S, 2), np.int32)
    batch[name] = np.zeros(shape, np.int32)
    step = make_train_step(tiny(), jnp.ones(V))
    with pytest.raises(AssertionError, match="shape"):
        jax.eval_shape(step, initial_state(), batch)
