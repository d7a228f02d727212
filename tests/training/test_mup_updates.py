"""muP in training: updates against AdamW by hand, and nothing else than AdamW without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsmoe_jax.config import OptimizerConfig
from dsmoe_jax.training.optimizer import decayed, make_optimizer, make_schedule
from dsmoe_jax.training.start import init_state
from dsmoe_jax.training.step import jit_train_step
from tests.tools.tiny import batch, tiny

CONFIG = OptimizerConfig(
    peak_learning_rate=0.01, warmup_steps=2, weight_decay=0.3, eps=1e-3, clip_norm=2.0
)
# One parameter of each kind; the power of the width ratio in its rate, and whether it decays.
BY_HAND = {
    "embedding_VD": (0, True),
    "gate_EFD": (-1, True),
    "router_ED": (-1, True),
    "head_VD": (-1, True),
    "scale_D": (0, False),
}


def trees(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(3, 4)).astype(np.float32) for name in BY_HAND}


def run(optimizer, params, steps=3):
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(trees(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw_by_hand(ratio, steps=3):
    """1711.05101, algorithm 2, in float64; Adam's part of the step times ratio^power."""
    params = {name: x.astype(np.float64) for name, x in trees(0).items()}
    m = dict.fromkeys(params, 0.0)
    v = dict.fromkeys(params, 0.0)
    for t in range(1, steps + 1):
        grads = {name: g.astype(np.float64) for name, g in trees(t).items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 2.0, "the gradients of this test are clipped"
        rate = 0.01 * min(t / 2, 1)
        for name, (power, decays) in BY_HAND.items():
            g = grads[name] * 2.0 / norm
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-3)
            decay = 0.3 * params[name] if decays else 0.0
            params[name] = params[name] - rate * (ratio**power * step + decay)
    return params


@pytest.mark.parametrize("ratio", [1.0, 4.0, 0.5])
def test_updates_of_every_kind_are_those_by_hand(ratio):
    """The rate is scaled by kind; the share that decays in a step is not."""
    found = run(make_optimizer(CONFIG, 100, ratio), trees(0))
    for name, wanted in adamw_by_hand(ratio).items():
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=1e-6, err_msg=name)


def test_without_mup_the_optimizer_is_optax_adamw():
    """The same updates bit for bit, and a state of the same form, as checkpoints have it."""
    plain = optax.chain(
        optax.clip_by_global_norm(2.0),
        optax.adamw(
            make_schedule(CONFIG, 100), b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.3, mask=decayed
        ),
    )
    ours = make_optimizer(CONFIG, 100)
    params = jax.tree.map(jnp.asarray, trees(0))
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(plain.init(params))
    for name, found in run(ours, trees(0)).items():
        np.testing.assert_array_equal(found, run(plain, trees(0))[name], err_msg=name)


def test_at_the_base_width_training_is_that_without_mup():
    """Losses and parameters of three steps, bit for bit."""
    ends = []
    for base in (None, 32):
        config = tiny(**{"model.mup_base_width": base})
        state = init_state(config)
        step = jit_train_step(config, np.ones(512, np.int32))
        losses = []
        for i in range(3):
            state, metrics = step(state, batch(config, i))
            losses.append(float(metrics.total_loss))
        ends.append((losses, state.params))
    assert ends[0][0] == ends[1][0]
    jax.tree.map(np.testing.assert_array_equal, ends[0][1], ends[1][1])
