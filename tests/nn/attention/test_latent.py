"""The cache of latent attention: both forms, step by step, against the pass without a cache.

Shapes: B sequences, S positions, D hidden.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import AttentionConfig, RopeScaling
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.nn import attention

B, S, D = 2, 13, 24
SIZES = {
    "q_lora_rank": 7, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8,
    "v_head_dim": 5,
}  # fmt: skip
CONFIG = AttentionConfig(
    "latent", num_attention_heads=4, rope_interleaved=True,
    rope_scaling=RopeScaling(4.0, original_max_position_embeddings=8, mscale_all_dim=1.0),
    options=FrozenDict(SIZES),
)  # fmt: skip
FORMS = ["absorbed", "expanded"]


def layer(form):
    config = dataclasses.replace(CONFIG, options=FrozenDict({**SIZES, "decode": form}))
    make = attention.get(config).module
    return make(D, 0.5, config, rms_norm_eps=1e-6, rngs=nnx.Rngs(0))


def positions(first, last):
    return jnp.tile(jnp.arange(first, last), (B, 1))


@pytest.mark.parametrize("form", FORMS)
def test_prefill_and_decoding_equal_the_whole_pass(form):
    x_BSD = jax.random.normal(jax.random.key(1), (B, S, D))

    @jax.jit
    def run(x_BSD):
        attend = layer(form)
        whole, _ = attend(x_BSD, positions(0, S), attention.CausalMask())
        cache = attention.get(CONFIG).empty_cache(CONFIG, B, S + 3, jnp.dtype("float32"))
        parts = []
        for first, last in [(0, S - 2), (S - 2, S - 1), (S - 1, S)]:
            mask = attention.CausalMask(start=first, n_keys=S + 3)
            y_BSD, cache = attend(
                x_BSD[:, first:last], positions(first, last), mask, cache, first
            )  # fmt: skip
            parts.append(y_BSD)
        return whole, jnp.concatenate(parts, axis=1)

    whole, in_parts = run(x_BSD)
    np.testing.assert_allclose(in_parts, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_absorbed_makes_nothing_of_the_length_of_the_cache_for_each_head(form):
    """But scores, which have one number for each key."""
    length = 97

    def decode(x_BSD):
        cache = attention.get(CONFIG).empty_cache(CONFIG, B, length, jnp.dtype("float32"))
        mask = attention.CausalMask(start=5, n_keys=length)
        return layer(form)(x_BSD, positions(5, 6), mask, cache, 5)

    text = str(jax.make_jaxpr(decode)(jnp.ones((B, 1, D))))
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)}
    of_keys = {tuple(sorted(s)) for s in shapes if length in s and 4 in s and 1 not in s}
    by_head = {tuple(sorted((B, length, 4, size))) for size in (6, 6 + 8, 5)}
    assert (of_keys & by_head == set()) == (form == "absorbed")
