"""An entry of the registry describes what its module does."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.nn import attention

CONFIGS = [
    AttentionConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=4),
    AttentionConfig(num_attention_heads=3, head_dim=4),  # as many key/value heads
]


def build(config, hidden_size=8):
    make = attention.get(config).module
    return make(hidden_size, 0.02, config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_those_of_the_module(config):
    module = nnx.eval_shape(lambda: build(config))
    sizes = [math.prod(x.shape) for _, x in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    assert attention.get(config).parameters(8, config) == sum(sizes)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_begins_with_its_sequences_and_positions(config):
    """The model takes the length of a cache from its arrays, whatever the attention."""

    @jax.jit
    def fill():
        cache = attention.get(config).empty_cache(config, 2, 5, jnp.dtype("bfloat16"))
        x_BSD = jnp.ones((2, 3, 8), jnp.bfloat16)
        positions_BS = jnp.tile(jnp.arange(3), (2, 1))
        mask = attention.CausalMask(start=1, n_keys=5)
        return cache, build(config)(x_BSD, positions_BS, mask, cache, 1)[1]

    cache, filled = map(jax.device_get, fill())
    for before, after in zip(cache, filled, strict=True):
        assert before.shape[:2] == (2, 5)
        assert (after.shape, after.dtype) == (before.shape, jnp.bfloat16)
        assert (after[:, [0, 4]] == 0).all()
        assert (after[:, 1:4] != 0).any(axis=(2, 3)).all()


def test_flops_and_activations_by_hand():
    config = AttentionConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=4)
    grouped = attention.get(config)
    # Scores and values: each 2 FLOPs for each of 6 x 4 numbers and key; backward twice as much.
    assert grouped.train_flops(config, 100) == 3 * 2 * 2 * 6 * 4 * 100
    assert grouped.activations(config, 100) == (6 * 4 + 2 * 4 + 2 * 4, 6 * 100, 6 * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sparse"}, r"model\.attention\.name='sparse': must be one of \['grouped'\]"),
        (
            {"options": {"rank": 3}},
            r"model\.attention\.options\.rank=3: not of the grouped attention; it has no options",
        ),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        attention.get(AttentionConfig(**changes))
