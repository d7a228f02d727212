"""Sampling: the choice of the next token from the logits.

The rules, their order and their edge cases are those of Hugging Face transformers: repetition
penalty, temperature, top-k, top-p.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from dsmoe_jax.config.checks import require

# The smallest normal float32.  XLA multiplies by the reciprocal, which must be one too: smaller
# numbers are taken for 0.
_COLDEST = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the choice of the next token.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: samples from the k most likely tokens, and those as likely as the last of them; None
        keeps all.
      top_p: samples from the smallest set of tokens whose probabilities reach this sum (nucleus
        sampling, 1904.09751); 1 keeps all.
      repetition_penalty: divides the positive logits of tokens that are in the text already, prompt
        included, and multiplies the negative ones (CTRL, 1909.05858, section 4.1); 1 is none.  It
        holds at temperature 0 too.

    Raises:
      ValueError: naming the field that is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        t = self.temperature
        require(math.isfinite(t), "temperature", t, "must be finite")
        require(t >= 0, "temperature", t, "must be >= 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        top_k = self.top_k
        require(top_k is None or top_k > 0, "top_k", top_k, "must be > 0, or None")
        penalty = self.repetition_penalty
        fits = 0 < penalty < math.inf
        require(fits, "repetition_penalty", penalty, "must be above 0 and finite")


GREEDY = Sampling()


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None
) -> jax.Array:
    """The next token of each text, int32 of shape (B,).

    Args:
      logits_BV: float32; -inf is never drawn.
      keys_B: a random key for each text, unused at temperature 0.
      sampling: how to draw.
      seen_BV: bool, the tokens in each text so far; only a repetition penalty needs it.
    """
    if sampling.repetition_penalty != 1.0:
        assert seen_BV is not None, "a repetition penalty needs the tokens that were seen"
        logits_BV = penalised(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys_B, filtered(logits_BV, sampling)).astype(jnp.int32)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits in which tokens that were seen are less likely; see `Sampling.repetition_penalty`."""
    less_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, less_BV, logits_BV)


def filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits whose softmax is drawn from, by temperature, top-k and top-p.

    Args:
      logits_BV: float32, at least one of each text above -inf.
      sampling: at a temperature above 0.
    """
    # There the limits are reached: the best tokens alone, or all with equal chances.
    temperature = min(max(sampling.temperature, _COLDEST), 1 / _COLDEST)
    # Relative to the best logit a quotient may overflow to -inf, a probability of 0, but not to
    # inf, of which any difference is NaN.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    if sampling.top_k is not None:
        logits_BV = _best(logits_BV, sampling.top_k)
    return logits_BV if sampling.top_p == 1.0 else _nucleus(logits_BV, sampling.top_p)


def _best(logits_BV: jax.Array, k: int) -> jax.Array:
    """The k largest logits of each text, and those that equal the last of them; else -inf."""
    best_BK, _ = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))
    return jnp.where(logits_BV < best_BK[:, -1:], -jnp.inf, logits_BV)


def _nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """The logits of the smallest set whose probabilities reach `top_p`; else -inf."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    p_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    # The first token, before which there is nothing, stays even if top_p rounds to 0.
    sorted_BV = (before_BV >= top_p) & (before_BV > 0)
    dropped_BV = jnp.take_along_axis(sorted_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
    return jnp.where(dropped_BV, -jnp.inf, logits_BV)
