"""An entry of the registry describes what its module does."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.nn import attention


def with_options(config, **options):
    return dataclasses.replace(config, options=FrozenDict({**config.options, **options}))


GROUPED = AttentionConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=4)
SIZES = {"kv_lora_rank": 7, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
LATENT = AttentionConfig("latent", num_attention_heads=3, options=FrozenDict(SIZES))
CONFIGS = {
    "grouped": GROUPED,
    "as many key/value heads": AttentionConfig(num_attention_heads=3, head_dim=4),
    "bias and norm by head": with_options(GROUPED, bias=True, qk_norm="head"),
    "norm of all heads": with_options(GROUPED, qk_norm="all"),
    "latent": LATENT,
    "latent queries": with_options(LATENT, q_lora_rank=5),
}


def build(config, hidden_size=8):
    make = attention.get(config).module
    return make(hidden_size, 0.02, config, rms_norm_eps=1e-6, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_the_module(config):
    module = nnx.eval_shape(lambda: build(config))
    sizes = [math.prod(x.shape) for _, x in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    assert attention.get(config).parameters(8, config) == sum(sizes)


@pytest.mark.parametrize("config", [GROUPED, LATENT], ids=["grouped", "latent"])
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
        assert (after[:, 1:4] != 0).reshape(2, 3, -1).any(axis=2).all()


def test_bytes_of_a_cache_by_hand():
    """V2 table 1: 2 N H numbers with as many key/value heads, d_c + d_h^R with latent attention."""
    v2_lite = AttentionConfig("latent", num_attention_heads=16)
    grouped = AttentionConfig(num_attention_heads=16, num_key_value_heads=4)
    assert attention.cache_bytes(v2_lite, jnp.dtype("bfloat16")) == 2 * (512 + 64)
    assert attention.cache_bytes(grouped, jnp.dtype("float32")) == 4 * 2 * 4 * 128


def test_flops_and_activations_by_hand():
    config = GROUPED
    grouped = attention.get(config)
    # Scores and values: each 2 FLOPs for each of 6 x 4 numbers and key; backward twice as much.
    assert grouped.train_flops(config, 100) == 3 * 2 * 2 * 6 * 4 * 100
    assert grouped.activations(config, 100) == (6 * 4 + 2 * 4 + 2 * 4, 6 * 100, 6 * 4)
    config = with_options(LATENT, q_lora_rank=5)
    latent = attention.get(config)
    # 3 heads: keys of 4 + 2 numbers, values of 3.
    assert latent.head_sizes(config) == (6, 3)
    assert latent.train_flops(config, 100) == 3 * 2 * (3 * 6 + 3 * 3) * 100
    assert latent.activations(config, 100) == (3 * (6 + 6 + 3) + 5 + 7 + 2, 3 * 100, 3 * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sparse"}, r"name='sparse': must be one of \['grouped', 'latent'\]"),
        (
            {"options": FrozenDict(rank=3)},
            r"options\.rank=3: not of the grouped .*; its options are \['bias', 'qk_norm'\]",
        ),
        ({"options": FrozenDict(bias=1)}, r"options\.bias=1: must be of type bool"),
        (
            {"options": FrozenDict(qk_norm="heads")},
            r"options\.qk_norm='heads': must be one of \['all', 'head', 'none'\]",
        ),
        (
            {"name": "latent", "options": FrozenDict(decode="fast")},
            r"options\.decode='fast': must be one of \['absorbed', 'expanded'\]",
        ),
        (
            {"name": "latent", "options": FrozenDict(qk_rope_head_dim=3)},
            r"options\.qk_rope_head_dim=3: must be even for RoPE",
        ),
        (
            {"name": "latent", "options": FrozenDict(kv_lora_rank=0)},
            r"options\.kv_lora_rank=0: must be > 0",
        ),
        (
            {"name": "latent", "num_attention_heads": 4, "num_key_value_heads": 2},
            r"num_key_value_heads=2: latent attention makes .* each of 4 heads; must be None",
        ),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^model\.attention\.{message}$"):
        attention.get(AttentionConfig(**changes))
