"""The tiny model with every kind of layer: leading dense ones, shared experts, grouped queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import Config
from dsmoe_jax.model.build import build_model
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe.interventions import GENERATION
from tests.tools import tiny

V = 64
MODEL = {
    "model.vocab_size": V,
    "model.num_hidden_layers": 4,
    "model.first_k_dense_replace": 2,
    "model.intermediate_size": 48,
    "model.initializer_range": 0.1,
    "model.attention.num_attention_heads": 4,
    "model.attention.num_key_value_heads": 2,
    "model.attention.head_dim": 8,
    "model.moe.n_routed_experts": 6,
    "data.tokenizer_vocab_size": V,
}


def config_of(**overrides: object) -> Config:
    """The config of the tiny model with dotted keys changed."""
    return tiny.tiny(**{**MODEL, **overrides})


def make(**overrides: object) -> Transformer:
    """The tiny model with dotted keys changed, its parameters drawn from one key."""
    config = config_of(**overrides).model
    return jax.jit(lambda: build_model(config, jax.random.key(0)))()


def greedy(model: Transformer, prompt_BP: jax.Array, n: int) -> jax.Array:
    """The n tokens that follow prompts, each from a pass over the whole sequence: no cache."""
    graph, state = nnx.split(model)

    @jax.jit
    def logits(state, tokens_BS):
        model = nnx.merge(graph, state)
        return model.forward(ModelInputs(tokens_BS), intervention=GENERATION).logits_BSV

    p = prompt_BP.shape[1]
    tokens_BS = jnp.pad(prompt_BP, ((0, 0), (0, n)))  # what comes later is not seen
    for i in range(p, p + n):
        best_B = jnp.argmax(logits(state, tokens_BS)[:, i - 1], axis=-1)
        tokens_BS = tokens_BS.at[:, i].set(best_B)
    return tokens_BS[:, p:]
