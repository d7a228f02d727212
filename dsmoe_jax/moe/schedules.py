"""Schedules over a run: the weight of a balance term, the speed of the loss-free bias."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import Schedule


class Progress(NamedTuple):
    """A step of a run: the updates made before it, and those of the whole run."""

    step: jax.Array
    steps: int


def multiple(schedule: Schedule | None, progress: Progress) -> jax.Array:
    """The multiple at a step: straight lines between the pairs, constant before and after them.

    Of two pairs with the same share the second one holds from the step at that share.
    """
    if schedule is None:
        return jnp.float32(1.0)
    shares, multiples = zip(*schedule, strict=True)
    # In steps and not in shares: step / steps, which XLA computes as a product, may be a bit below
    # the share, and a jump would come a step late.
    steps = [share * progress.steps for share in shares]
    steps = [-1.0, *steps, progress.steps + 1.0]
    multiples = multiples[0], *multiples, multiples[-1]
    step = jnp.asarray(progress.step, jnp.float32)
    return jnp.interp(step, jnp.array(steps, jnp.float32), jnp.array(multiples, jnp.float32))
