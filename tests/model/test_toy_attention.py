"""An attention is added by an entry of its registry alone: here one with another kind of cache.

Every token sees the mean of what it may see, in a few numbers: as with latent attention, the cache
has no heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import replace
from dsmoe_jax.model import size
from dsmoe_jax.model.build import build_model
from dsmoe_jax.model.generation import generate
from dsmoe_jax.nn import attention
from dsmoe_jax.nn.attention import Activations, Attention
from dsmoe_jax.nn.layers import init_matrix, linear
from dsmoe_jax.planning import planner
from dsmoe_jax.training.start import init_state
from dsmoe_jax.training.step import make_train_step
from tests.model.tiny_model import V, config_of, greedy
from tests.tools.tiny import batch

B, S = 2, 8
OPTIONS = {"rank": 4}


def rank(config):
    return {**OPTIONS, **config.options}["rank"]


class MeanCache(NamedTuple):
    latent_BLH: jax.Array


class MeanAttention(nnx.Module):
    def __init__(self, hidden_size, initializer_range, config, *, rms_norm_eps, rngs):
        self.down_HD = init_matrix(rngs, (rank(config), hidden_size), initializer_range)
        self.up_DH = init_matrix(rngs, (hidden_size, rank(config)), initializer_range)

    def __call__(self, x_BSD, positions_BS, mask, cache=None, cache_length=0):
        latent_BLH = linear(x_BSD, self.down_HD)
        if cache is not None:
            at = (0, cache_length, 0)
            latent_BLH = jax.lax.dynamic_update_slice(cache.latent_BLH, latent_BLH, at)
            cache = MeanCache(latent_BLH)
        mask_BSL = mask.dense(*x_BSD.shape[:2])
        sums_BSH = jnp.einsum("bsl,blh->bsh", mask_BSL.astype(x_BSD.dtype), latent_BLH)
        return linear(sums_BSH / mask_BSL.sum(axis=-1, keepdims=True), self.up_DH), cache


MEAN = Attention(
    module=MeanAttention,
    empty_cache=lambda config, batch, length, dtype: MeanCache(
        jnp.zeros((batch, length, rank(config)), dtype)
    ),
    parameters=lambda hidden_size, config: 2 * hidden_size * rank(config),
    train_flops=lambda config, length: 6 * length * rank(config),
    activations=lambda config, length: Activations(rank(config), length, rank(config)),
    options=OPTIONS,
)


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(attention.ATTENTION, "mean", MEAN)
    return config_of(
        **{
            "model.attention.name": "mean",
            "model.attention.options.rank": 3,
            "model.moe.n_routed_experts": 2,
            "model.moe.num_experts_per_tok": 1,
            "data.sequence_length": S,
            "train.global_batch_size": B,
        }
    )


def test_generation_equals_recomputing_the_whole_sequence(config):
    sharp = replace(config, **{"model.initializer_range": 0.5})
    model = jax.jit(lambda: build_model(sharp.model, jax.random.key(0)))()
    assert jax.tree.map(jnp.shape, model.empty_cache(B, 9).stacked) == MeanCache((2, B, 9, 3))
    prompt = jnp.array([[1, 2, 3], [9, 8, 7]])
    np.testing.assert_array_equal(generate(model, prompt, 4).tokens_BG, greedy(model, prompt, 4))


def test_a_step_trains_it(config):
    state = init_state(config)
    step = jax.jit(make_train_step(config, np.ones(V, np.int32)))
    after, metrics = step(state, batch(config))
    assert np.isfinite(metrics.loss)
    for name in ("down_HD", "up_DH"):
        for old, new in zip(_parameters(state, name), _parameters(after, name), strict=True):
            assert (old != new).any()


def _parameters(state, name):
    """Those of one name: of two leading layers, and of the stacked ones."""
    flat = nnx.to_flat_state(state.params)
    found = [np.asarray(x[...]) for path, x in flat if path[-1] == name]
    assert len(found) == 3
    return found


def test_its_costs_are_counted(config):
    count = size.count_parameters(config.model)
    assert count == size.parameters_by_formula(config.model)
    with_grouped = replace(config, **{"model.attention": config_of().model.attention})
    grouped = 32 * 8 * 2 * (4 + 2)
    difference = size.count_parameters(with_grouped.model).total - count.total
    assert difference == 4 * (grouped - 2 * 32 * 3)
    longer = replace(config, **{"data.sequence_length": 2 * S})
    flops = size.train_flops_per_token(longer) - size.train_flops_per_token(config)
    assert flops == 4 * 6 * S * 3


def test_a_mesh_is_planned_for_it(config):
    best, _ = planner.propose(config, "v5e", 1)
    assert best.used > 0


def test_an_unknown_option_is_refused(config):
    wrong = replace(config, **{"model.attention.options.rang": 3})
    with pytest.raises(ValueError, match=r"options\.rang=3: not of the mean.*\['rank'\]"):
        size.count_parameters(wrong.model)
