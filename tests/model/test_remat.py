"""Rematerialisation changes what is kept, not what comes out."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsmoe_jax.model.build import abstract_model
from dsmoe_jax.model.remat import REMAT
from dsmoe_jax.nn import kept
from dsmoe_jax.nn.attention.kernels import splash
from dsmoe_jax.nn.attention.mask import CausalMask
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
    assert products["none"] < products["named"] <= products["full"]
    assert "remat" in text["dots"]
    assert "remat" not in text["none"]


def test_attention_names_what_its_gradient_needs():
    """The other name is that of rows received: tests/moe/test_dispatchers.py."""
    assert set(REMAT["named"].kept) == {kept.ATTENDED, kept.RECEIVED}
    x_BSNH = jnp.ones((1, 128, 2, 128))
    attend = functools.partial(splash.attend, mask=CausalMask(), interpret=True)
    text = str(jax.make_jaxpr(lambda x: jax.vjp(attend, x, x, x)[0])(x_BSNH))
    assert set(re.findall(r"name\[name=(\w+)\]", text)) == {kept.ATTENDED}


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"model\.remat='some'.*'none', 'dots', 'named', 'full'"):
        abstract_model(config_of(**{"model.remat": "some"}).model)
