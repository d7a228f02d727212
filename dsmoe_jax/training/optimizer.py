"""AdamW, clipping and the paper's learning-rate schedules, all from optax."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsmoe_jax.config import Config, OptimizerConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.model import mup


def multi_step(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then x `decay_factor` at each share `decay_at` of the steps (V1 4.1.3).

    Raises:
      ValueError: for a warm-up that is not over when the first decay comes.
    """
    decays = Counter(round(share * steps) for share in config.decay_at)
    first = min(decays, default=steps)
    require(
        config.warmup_steps <= first,
        "optimizer.warmup_steps",
        config.warmup_steps,
        f"must not exceed {first}, the step of the first decay"
        f" (optimizer.decay_at={config.decay_at} of {steps} steps)",
    )
    # In a short run several decays fall on one step, and each counts.
    drops = {step: config.decay_factor**number for step, number in decays.items()}
    plateau = optax.piecewise_constant_schedule(config.peak_learning_rate, drops)
    return _warmed_up(plateau, config.warmup_steps)


def constant(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant: the 145B setting (V1 section 7.1)."""
    del steps
    return _warmed_up(optax.constant_schedule(config.peak_learning_rate), config.warmup_steps)


def cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, constant, then half a cosine down to x `decay_factor` (V3 section 4.2).

    It falls from the first to the second of the shares `decay_at`, and stays there.

    Raises:
      ValueError: for other than two shares, or a warm-up that is not over when the rate falls.
    """
    at = config.decay_at
    require(
        len(at) == 2, "optimizer.decay_at", at, "must be two shares for optimizer.schedule=cosine"
    )
    first, last = (round(share * steps) for share in at)
    require(
        config.warmup_steps <= first < last,
        "optimizer.warmup_steps",
        config.warmup_steps,
        f"must not exceed {first}, the step from which the rate falls until {last}"
        f" (optimizer.decay_at={at} of {steps} steps)",
    )
    peak = config.peak_learning_rate
    falling = optax.cosine_decay_schedule(peak, last - first, config.decay_factor)
    parts = [optax.constant_schedule(peak), falling]
    return _warmed_up(optax.join_schedules(parts, [first]), config.warmup_steps)


def _warmed_up(schedule: optax.Schedule, warmup_steps: int) -> optax.Schedule:
    if not warmup_steps:
        return schedule
    # +1: the first update is not wasted on a learning rate of 0.
    return lambda step: jnp.minimum((step + 1) / warmup_steps, 1.0) * schedule(step)


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "multi_step": multi_step,
    "constant": constant,
    "cosine": cosine,
}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    Args:
      config: of the optimizer.
      steps: that shares are of, `TrainConfig.scheduled_steps`; after them the last rate stays.

    Raises:
      ValueError: for an unknown schedule, or a warm-up that ends after the first decay.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(
            f"optimizer.schedule={config.schedule!r}: must be one of {sorted(SCHEDULES)}"
        )
    if config.warmup_steps > steps:
        raise ValueError(
            f"optimizer.warmup_steps={config.warmup_steps}: must not exceed {steps}, the steps of"
            " the schedule (train.schedule_steps, or else train.steps)"
        )
    return SCHEDULES[config.schedule](config, steps)


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    width_ratio: float | None = None,
    *,
    tied: bool = False,
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW; norm scales and biases are not decayed.

    With muP the step that Adam makes is multiplied by kind of parameter, the weight decay is not:
    in each step a weight loses the share rate x `weight_decay`, at every width.

    Args:
      config: of the optimizer.
      steps: of the schedule, see `make_schedule`.
      width_ratio: the m of `model/mup.py`; None is the standard parametrisation.
      tied: whether embedding and head are one matrix, for muP.
    """
    adamw = [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    ]
    if width_ratio is not None:  # after Adam, which would divide a factor out, and before the decay
        rates = functools.partial(mup.scale_rates, ratio=width_ratio, tied=tied)
        adamw.insert(1, optax.stateless(lambda adam, _: rates(adam)))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.chain(*adamw))


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """The optimizer of a run (of one stage)."""
    ratio = mup.width_ratio(config.model)
    tied = config.model.tie_word_embeddings
    return make_optimizer(config.optimizer, config.train.scheduled_steps, ratio, tied=tied)


def decayed(params: Any) -> Any:
    """Which parameters weight decay pulls to zero: all but the norms' scales and biases."""
    return jax.tree.map_with_path(lambda path, _: mup.decayed(path), params)
