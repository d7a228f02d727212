"""Rematerialisation changes what is kept, not what comes out."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsmoe_jax.model.build import abstract_model
from dsmoe_jax.model.remat import REMAT
from tests.model.tiny_model import V, config_of

TOKENS = jax.random.randint(jax.random.key(5), (2, 12), 0, V)


def test_memory_changes_but_not_the_results(model):
    params = nnx.split(model, nnx.Param, ...)[1:]
    losses, text = {}, {}
    for name in REMAT:
        graph = abstract_model(config_of(**{"model.remat": name}).model)

        def loss(params, graph=graph):
            return jnp.square(nnx.merge(graph, *params)(TOKENS)).mean()

        losses[name] = jax.jit(jax.value_and_grad(loss))(params)
        text[name] = str(jax.make_jaxpr(jax.grad(loss))(params))
        chex.assert_trees_all_close(losses[name], losses["none"], rtol=1e-4, atol=1e-6)
    # Recomputing everything means more matrix products in the gradient than keeping them.
    products = {name: text[name].count("dot_general") for name in text}
    assert products["none"] < products["full"]
    assert products["none"] <= products["dots"] < products["full"]
    assert "remat" in text["dots"]
    assert "remat" not in text["none"]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"model\.remat='some'.*'none', 'dots', 'full'"):
        abstract_model(config_of(**{"model.remat": "some"}).model)
