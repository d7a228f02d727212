"""Continues a prompt with a KV cache: one prefill, then one token at a time in a compiled loop.

Shapes: B prompts, P their common length, G generated tokens, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.routers import get_router

# The smallest normal float32.  XLA multiplies by the reciprocal, which must be one too: smaller
# numbers are taken for 0.
_COLDEST = float(jnp.finfo(jnp.float32).tiny)


def sample(logits_BV: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """The next token of each sequence, int32 of shape (B,).

    Args:
      logits_BV: float32; -inf is never drawn.
      key: random key, unused at temperature 0.
      temperature: 0 takes the most likely token (greedy).
      top_p: samples from the smallest set of tokens whose probabilities reach this sum (nucleus
        sampling, 1904.09751); 1 keeps all.
    """
    if temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # There the limits are reached: the best tokens alone, or all with equal chances.
    temperature = min(max(temperature, _COLDEST), 1 / _COLDEST)
    # Relative to the best logit a quotient may overflow to -inf, a probability of 0, but not to
    # inf, of which any difference is NaN.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    if top_p < 1.0:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        p_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        # The first token, before which there is nothing, stays even if top_p rounds to 0.
        sorted_BV = (before_BV >= top_p) & (before_BV > 0)
        dropped_BV = jnp.take_along_axis(sorted_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
        logits_BV = jnp.where(dropped_BV, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def generate(
    model: Transformer,
    prompt_BP: jax.Array,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    allowed_V: np.ndarray | None = None,
) -> jax.Array:
    """Continues prompts of equal length, each as if it were alone: see `interventions.GENERATION`.

    Args:
      model: trained.
      prompt_BP: int32, at least one token each.
      max_new_tokens: G.
      temperature, top_p: see `sample`.
      seed: of the sampling.
      allowed_V: bool, the tokens that may be generated; None: all of the model's.

    Returns:
      tokens_BG, int32 (not cut after an end-of-text token).

    Raises:
      ValueError: naming the argument that is out of range or takes too much memory, or the token
        whose logits are not finite.
    """
    v = model.config.vocab_size
    allowed_V = np.ones(v, bool) if allowed_V is None else np.asarray(allowed_V, bool)
    require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be > 0")
    require(temperature >= 0, "temperature", temperature, "must be >= 0")
    require(0 < top_p <= 1, "top_p", top_p, "must be in (0, 1]")
    _check_tokens(prompt_BP, allowed_V, v)
    graph, state = nnx.split(model)
    key = jax.random.key(seed)
    try:
        tokens_BG, finite_G = _run(
            graph, state, prompt_BP, jnp.asarray(allowed_V), key, max_new_tokens, temperature, top_p
        )
        finite_G = np.asarray(finite_G)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        b, p = prompt_BP.shape
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: the memory is not enough for the keys and values of"
            f" {b} x {p + max_new_tokens} tokens; must be less"
        ) from error
    if not finite_G.all():
        raise ValueError(
            f"logits of generated token {1 + int(finite_G.argmin())}: not finite; the model's"
            " training diverged or its parameters are damaged; an earlier checkpoint may be sound"
        )
    return tokens_BG


def routing_notes(moe: MoEConfig) -> list[str]:
    """Sentences on what is routed otherwise than in training and evaluation."""
    if not moe.n_routed_experts:
        return []
    router, settings = get_router(moe)
    notes = []
    if router.competes or router.alone is not None:
        experts = "one expert" if settings.k == 1 else f"{settings.k} experts"
        notes.append(
            f"note: in training the {moe.router.name} router routes the tokens of a batch together;"
            f" here each token goes to {experts} of its own"
        )
    if moe.evaluation_drop is not None:
        notes.append(
            "note: nothing is dropped here, whatever model.moe.evaluation_drop does in evaluation"
        )
    return notes


def _check_tokens(prompt_BP: jax.Array, allowed_V: np.ndarray, v: int) -> None:
    """Refuses ids that the model does not have, and a choice of none."""
    some = prompt_BP.ndim == 2 and prompt_BP.size > 0
    require(some, "prompt", prompt_BP.shape, "must be (B, P), at least one token each")
    require(jnp.issubdtype(prompt_BP.dtype, jnp.integer), "prompt", prompt_BP.dtype, "must be ids")
    first, last = int(prompt_BP.min()), int(prompt_BP.max())
    known = first >= 0 and last < v
    require(known, "prompt", (first, last), f"smallest and largest id; must be 0 to {v - 1}")
    require(allowed_V.shape == (v,), "allowed", allowed_V.shape, f"must be of shape {(v,)}")
    require(bool(allowed_V.any()), "allowed", "none", "must allow a token")


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _run(
    graph,
    state,
    prompt_BP,
    allowed_V,
    key,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
    """Tokens (B, G), and whether the logits of each of the G were finite."""
    model: Transformer = nnx.merge(graph, state)
    forward = functools.partial(model.forward, intervention=interventions.GENERATION)
    b, p = prompt_BP.shape
    output = forward(ModelInputs(prompt_BP), model.empty_cache(b, p + max_new_tokens))

    def step(carry, key):
        logits_BV, cache = carry
        finite = (jnp.isfinite(logits_BV) | ~allowed_V).all()
        token_B = sample(jnp.where(allowed_V, logits_BV, -jnp.inf), key, temperature, top_p)
        output = forward(ModelInputs(token_B[:, None]), cache)
        return (output.logits_BSV[:, -1], output.cache), (token_B, finite)

    keys = jax.random.split(key, max_new_tokens)
    first = output.logits_BSV[:, -1], output.cache
    _, (tokens_GB, finite_G) = jax.lax.scan(step, first, keys)
    return tokens_GB.T, finite_G
