"""A model without its arrays: the structure and shapes of the real one, and nothing allocated."""

import chex
import jax
import pytest
from flax import nnx

from dsmoe_jax.config import Config, ModelConfig, replace
from dsmoe_jax.model.build import abstract_model, build_model, model_shapes


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return replace(
        Config(),
        **{
            "model.vocab_size": 32, "model.hidden_size": 16, "model.num_hidden_layers": 2,
            "model.attention.num_attention_heads": 2, "model.attention.num_key_value_heads": 2,
            "model.attention.head_dim": 8, "model.moe.n_routed_experts": 4,
            "model.moe.num_experts_per_tok": 2, "model.moe.moe_intermediate_size": 16,
            "model.moe.router.bias_update_speed": 1e-3, "data.tokenizer_vocab_size": 32,
        },
    ).model  # fmt: skip


def test_shapes_and_structure_are_those_of_the_model(config):
    graph, params, other = nnx.split(build_model(config, jax.random.key(0)), nnx.Param, ...)
    shapes = model_shapes(config)
    assert abstract_model(config) == graph
    assert jax.tree.leaves(shapes.other), "the bias is no parameter"
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, type(shapes)(params, other))


def test_nothing_is_allocated():
    huge = replace(Config(), **{"model.hidden_size": 2**20, "model.num_hidden_layers": 1000}).model
    sizes = [x.size for x in jax.tree.leaves(model_shapes(huge))]
    assert sum(sizes) > 1e14


def test_parameters_follow_the_key(config):
    draw = jax.jit(lambda key: nnx.state(build_model(config, key), nnx.Param))
    first = draw(jax.random.key(0))
    chex.assert_trees_all_equal(first, draw(jax.random.key(0)))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first, draw(jax.random.key(1)))
