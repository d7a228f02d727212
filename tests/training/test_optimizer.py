"""Schedules against the paper's formulas, weight decay and clipping."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from dsmoe_jax.config import OptimizerConfig, from_config_dict
from dsmoe_jax.training.optimizer import decayed, make_optimizer, make_schedule


def test_multi_step_is_the_schedule_of_the_paper():
    """V1 section 4.1.3: 2K steps of warm-up, x 0.316 at 80 % and again at 90 % of 25K steps."""
    schedule = make_schedule(OptimizerConfig(), steps=25_000)
    peak = 1.08e-3
    for step in (0, 1, 999, 1999, 2000, 12_345, 19_999, 20_000, 22_499, 22_500, 24_999):
        warmup = min((step + 1) / 2000, 1.0)
        drops = (step >= 20_000) + (step >= 22_500)
        assert math.isclose(schedule(step), peak * warmup * 0.316**drops, rel_tol=1e-6), step


def test_decays_on_the_same_step_count_each():
    """The whole curve of short runs against the formula, by shares that round to one step."""
    config = OptimizerConfig(peak_learning_rate=0.004, warmup_steps=2)
    cases = [(5, (0.8, 0.9)), (7, (0.8, 0.82, 0.84, 0.9)), (10, (0.8, 0.9)), (4, (0.5, 0.99))]
    for steps, decay_at in cases:
        schedule = make_schedule(dataclasses.replace(config, decay_at=decay_at), steps)
        for step in range(steps + 3):
            decays = sum(step >= round(share * steps) for share in decay_at)
            rate = 0.004 * min((step + 1) / 2, 1.0) * 0.316**decays
            assert math.isclose(schedule(step), rate, rel_tol=1e-6), (steps, step)


def test_constant_is_the_schedule_of_the_145b():
    """V1 section 7.1: warm-up, then constant."""
    config = OptimizerConfig(peak_learning_rate=3e-4, schedule="constant", warmup_steps=2000)
    schedule = make_schedule(config, steps=13_000)
    for step in (0, 500, 1999, 2000, 12_999):
        expected = 3e-4 * min((step + 1) / 2000, 1.0)
        assert math.isclose(schedule(step), expected, rel_tol=1e-6), step


def test_cosine_is_the_schedule_of_v3():
    """V3 section 4.2: constant up to 10 of 14.8T tokens, a tenth of it at 14.3T."""
    config = from_config_dict(configs.load("deepseek_v3", "paper"))
    steps = config.train.steps
    schedule = make_schedule(config.optimizer, steps)
    first, last = round(10 / 14.8 * steps), round(14.3 / 14.8 * steps)
    for step in (0, 1999, first, (first + last) // 2, (3 * first + last) // 4, last, steps - 1):
        angle = math.pi * min(max((step - first) / (last - first), 0.0), 1.0)
        fallen = 0.1 + 0.9 * (1 + math.cos(angle)) / 2
        wanted = 2.2e-4 * min((step + 1) / 2000, 1.0) * fallen
        assert math.isclose(schedule(step), wanted, rel_tol=1e-5), step


def test_without_warmup_the_first_step_has_the_peak():
    schedule = make_schedule(OptimizerConfig(warmup_steps=0), steps=10)
    assert math.isclose(schedule(0), 1.08e-3, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(schedule="cosin"), r"optimizer.schedule='cosin': must be one of"),
        (
            OptimizerConfig(schedule="cosine", warmup_steps=0, decay_at=(0.5,)),
            r"optimizer.decay_at=\(0.5,\): must be two shares for optimizer.schedule=cosine",
        ),
        (
            OptimizerConfig(schedule="cosine", warmup_steps=9),
            r"optimizer.warmup_steps=9: must not exceed 8, the step from which the rate falls",
        ),
        (OptimizerConfig(warmup_steps=11), r"optimizer.warmup_steps=11: must not exceed .*10"),
        (
            OptimizerConfig(warmup_steps=6, decay_at=(0.5, 0.9)),
            r"optimizer.warmup_steps=6: must not exceed 5, .*optimizer.decay_at=\(0.5, 0.9\) of 10",
        ),
    ],
)
def test_impossible_schedules_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(config, steps=10)


def test_a_warmup_that_ends_where_the_first_decay_falls():
    """Update 5 has the whole peak, update 6 is the first that decays."""
    schedule = make_schedule(OptimizerConfig(warmup_steps=5, decay_at=(0.5,)), steps=10)
    np.testing.assert_allclose([schedule(4), schedule(5)], [1.08e-3, 0.316 * 1.08e-3], rtol=1e-6)


def test_norm_scales_and_biases_are_not_decayed():
    moe = {"router_ED": True, "router_bias_E": False}
    wanted = {"layers": {"attention_norm": {"scale_D": False}, "moe": moe}, "head": True}
    assert decayed(jax.tree.map(lambda _: 1.0, wanted)) == wanted


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(clip_norm=0.5, b1=0.0, warmup_steps=0)
    optimizer = make_optimizer(config, steps=10)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # norm 5
    _, state = optimizer.update(grads, optimizer.init(params), params)
    (adam,) = [s for s in state[1] if hasattr(s, "mu")]  # with b1 = 0 the gradient itself
    np.testing.assert_allclose(adam.mu["a"], [0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(adam.mu["b"], [0.4], rtol=1e-6)
