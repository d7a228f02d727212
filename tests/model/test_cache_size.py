"""Bytes of the cache, against the arrays and against the definition."""

import jax
import pytest
from flax import nnx

from dsmoe_jax.config import replace
from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.cache_size import cache_size, dense_hidden_size
from dsmoe_jax.model.size import count_parameters
from tests.model.tiny_model import config_of


def test_a_cache_has_that_many_bytes():
    config = config_of().model
    model = nnx.merge(abstract_model(config), *model_shapes(config))
    cache = model.empty_cache(3, 7)
    held = sum(x.nbytes for x in jax.tree.leaves((cache.leading, cache.of_runs)))
    size = cache_size(config)
    assert size.bytes_per_token == held / (3 * 7) == 4 * 2 * 2 * 8 * 4
    dense = 2 * 4 * dense_hidden_size(model.config) * 4
    assert size.dense_bytes_per_token == round(dense)


def test_the_dense_model_has_the_activated_parameters():
    """As counted on such a model: its D is near, for its norms count besides."""
    d = 48
    dense = {
        "model.hidden_size": d, "model.attention.num_attention_heads": 6,
        "model.attention.num_key_value_heads": 6, "model.moe.n_routed_experts": 0,
        "model.moe.num_experts_per_tok": 0, "model.intermediate_size": 8 * d // 3,
        "model.moe.moe_intermediate_size": 8 * d // 3, "model.moe.n_shared_experts": 1,
    }  # fmt: skip
    config = config_of(**dense).model
    assert dense_hidden_size(config) == pytest.approx(d, rel=0.005)
    sparse = config_of().model
    d = dense_hidden_size(sparse)
    parameters = 12 * 4 * d**2 + 2 * sparse.vocab_size * d
    assert parameters == pytest.approx(count_parameters(sparse).activated)
    more = replace(config_of(), **{"model.moe.n_routed_experts": 12}).model
    assert dense_hidden_size(more) == pytest.approx(d, rel=0.02), "only the router grows"
