"""Scores: from the logits of the experts to the numbers that choose and weigh them.

A new scoring function is a function and a line in `SCORING`.

Scores saturate: in float32 sigmoids are all 1 above a logit of 17, and all 0 below about -90, as
square roots of softplus are below about -200.  So each comes with its logarithm, from which gates
and affinities are normalised, and with numbers in the same order that do not saturate.

Shapes: T tokens, E routed experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import RouterConfig


class Scores(NamedTuple):
    """The scores of the experts, and forms of them that are exact where the scores saturate.

    Attributes:
      s_TE: s, by `scoring_func`.
      affinity_TE: s divided by its sum, a distribution over the experts (s' of V3 eq. 19).
      log_TE: log s, up to a summand of each token.
      logits_TE: numbers in the order of s that do not saturate; None: s is the finest there is.
    """

    s_TE: jax.Array
    affinity_TE: jax.Array
    log_TE: jax.Array
    logits_TE: jax.Array | None = None

    @property
    def order_TE(self) -> jax.Array:
        """The numbers by which the experts are ranked."""
        return self.s_TE if self.logits_TE is None else self.logits_TE


class Scoring(NamedTuple):
    """A scoring function in the registry.

    Attributes:
      scores: `logits_TE -> Scores`.
      rank_of_sum: from the numbers that rank several experts, on the last axis, to one number in
        the order of the sum of their scores, where those numbers are not the scores themselves.
      is_softmax: the affinities are the softmax of the logits.
    """

    scores: Callable[[jax.Array], Scores]
    rank_of_sum: Callable[[jax.Array], jax.Array]
    is_softmax: bool = False


def softmax(logits_TE: jax.Array) -> Scores:
    """`s = softmax(logits)` (V1 eq. 11)."""
    s_TE = jax.nn.softmax(logits_TE, axis=-1)
    return Scores(s_TE, s_TE, logits_TE)


def sigmoid(logits_TE: jax.Array) -> Scores:
    """`s = sigmoid(logits)` (V3 eq. 15)."""
    log_TE = jax.nn.log_sigmoid(logits_TE)
    affinity_TE = jax.nn.softmax(log_TE, axis=-1)
    return Scores(jax.nn.sigmoid(logits_TE), affinity_TE, log_TE, logits_TE)


def sqrt_softplus(logits_TE: jax.Array) -> Scores:
    """`s = sqrt(log(1 + exp(logits)))`: the scores of DeepSeek-V4."""
    log_TE = log_softplus(logits_TE) / 2
    # Where softplus is exp, its root is exp(logits / 2): softplus itself vanishes twice as early,
    # and the gradient of its root there is 0 / 0.
    small_TE = logits_TE < _SMALL
    root_TE = jnp.sqrt(jax.nn.softplus(jnp.where(small_TE, 0.0, logits_TE)))
    s_TE = jnp.where(small_TE, jnp.exp(jnp.where(small_TE, log_TE, 0.0)), root_TE)
    return Scores(s_TE, jax.nn.softmax(log_TE, axis=-1), log_TE, logits_TE)


_SMALL = -8.0  # exp of this is small enough for two terms of a series: its cube is below 2**-24


def log_softplus(x: jax.Array) -> jax.Array:
    """`log(log(1 + exp(x)))`, exact where exp(x) vanishes, and so is its gradient."""
    # log(y - y^2 / 2 + ...) of y = exp(x) is x - y / 2 + 5 y^2 / 24 - ...
    small = x < _SMALL
    y = jnp.exp(jnp.where(small, x, -jnp.inf))
    series = x - y / 2 + 5 * y * y / 24
    return jnp.where(small, series, jnp.log(jax.nn.softplus(jnp.where(small, 0.0, x))))


def total(s: jax.Array) -> jax.Array:
    """The sum of scores without those of -inf, experts that are not there; -inf if all are."""
    is_there = s > -jnp.inf
    return jnp.where(is_there.any(axis=-1), jnp.where(is_there, s, 0.0).sum(axis=-1), -jnp.inf)


def _logit_of_mean_sigmoid(logits: jax.Array) -> jax.Array:
    """The logit of the mean sigmoid: in the order of the sum of sigmoids, without its ties."""
    above = jax.nn.logsumexp(jax.nn.log_sigmoid(logits), axis=-1)
    below = jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), axis=-1)
    return above - below


def _log_of_sum_sqrt_softplus(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(log_softplus(logits) / 2, axis=-1)


SCORING: dict[str, Scoring] = {
    "softmax": Scoring(softmax, total, is_softmax=True),
    "sigmoid": Scoring(sigmoid, _logit_of_mean_sigmoid),
    "sqrtsoftplus": Scoring(sqrt_softplus, _log_of_sum_sqrt_softplus),
}


def scores(logits_TE: jax.Array, config: RouterConfig) -> Scores:
    """Scores of the experts by `scoring_func`."""
    return SCORING[config.scoring_func].scores(logits_TE)
