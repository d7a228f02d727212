"""Continues a prompt with a KV cache: one prefill, then one token at a time in a compiled loop.

Shapes: B prompts, P their common length, G generated tokens, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config.checks import require
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs


def sample(logits_BV: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """The next token of each sequence, int32 of shape (B,).

    Args:
      logits_BV: float32.
      key: random key, unused at temperature 0.
      temperature: 0 takes the most likely token (greedy).
      top_p: samples from the smallest set of tokens whose probabilities reach this sum (nucleus
        sampling, 1904.09751); 1 keeps all.
    """
    if temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_p < 1.0:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        p_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # the first token is always kept
        dropped_BV = jnp.take_along_axis(before_BV >= top_p, jnp.argsort(order_BV, axis=-1), -1)
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
) -> jax.Array:
    """Continues prompts of equal length.

    Args:
      model: trained.
      prompt_BP: int32, at least one token each.
      max_new_tokens: G.
      temperature, top_p: see `sample`.
      seed: of the sampling.

    Returns:
      tokens_BG, int32 (not cut after an end-of-text token).

    Raises:
      ValueError: naming the argument that is out of range.
    """
    require(prompt_BP.shape[1] > 0, "prompt", prompt_BP.shape, "needs at least one token")
    require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be > 0")
    require(temperature >= 0, "temperature", temperature, "must be >= 0")
    require(0 < top_p <= 1, "top_p", top_p, "must be in (0, 1]")
    graph, state = nnx.split(model)
    return _run(graph, state, prompt_BP, jax.random.key(seed), max_new_tokens, temperature, top_p)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _run(graph, state, prompt_BP, key, max_new_tokens: int, temperature: float, top_p: float):
    model: Transformer = nnx.merge(graph, state)
    b, p = prompt_BP.shape
    output = model.forward(ModelInputs(prompt_BP), model.empty_cache(b, p + max_new_tokens))

    def step(carry, key):
        logits_BV, cache = carry
        token_B = sample(logits_BV, key, temperature, top_p)
        output = model.forward(ModelInputs(token_B[:, None]), cache)
        return (output.logits_BSV[:, -1], output.cache), token_B

    keys = jax.random.split(key, max_new_tokens)
    _, tokens_GB = jax.lax.scan(step, (output.logits_BSV[:, -1], output.cache), keys)
    return tokens_GB.T
