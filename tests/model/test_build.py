"""A model without its arrays: the structure and shapes of the real one, and nothing allocated."""

import chex
import jax
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.model.build import ModelState, abstract_model, build_model, model_shapes
from tests.model.tiny_model import config_of, make

BIASED = {"model.moe.router.bias_update_speed": 1e-3}


def test_structure_and_shapes_are_those_of_the_model():
    graph, params, other = nnx.split(make(**BIASED), nnx.Param, ...)
    config = config_of(**BIASED).model
    assert abstract_model(config) == graph
    assert jax.tree.leaves(other), "the bias is no parameter"
    chex.assert_trees_all_equal_shapes_and_dtypes(model_shapes(config), ModelState(params, other))


def test_nothing_is_allocated():
    huge = replace(Config(), **{"model.hidden_size": 2**20, "model.num_hidden_layers": 1000}).model
    sizes = [x.size for x in jax.tree.leaves(model_shapes(huge))]
    assert sum(sizes) > 1e14


def test_parameters_follow_the_key():
    config = config_of().model
    draw = jax.jit(lambda key: nnx.state(build_model(config, key), nnx.Param))
    first = draw(jax.random.key(0))
    chex.assert_trees_all_equal(first, draw(jax.random.key(0)))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first, draw(jax.random.key(1)))
