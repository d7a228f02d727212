"""One matrix as embedding and head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import replace
from dsmoe_jax.model import mup, size
from dsmoe_jax.model.build import build_model
from dsmoe_jax.model.types import ModelInputs
from tests.model.tiny_model import V, config_of, make
from tests.tools.trees import by_path

FAST = {"xla_cpu_use_fusion_emitters": False}  # compiles in a third of the time
ONE_LAYER = {"model.num_hidden_layers": 1, "model.first_k_dense_replace": 0}
TIED = {"model.tie_word_embeddings": True, **ONE_LAYER}
TOKENS = jax.random.randint(jax.random.key(5), (2, 8), 0, V)
TARGETS = jnp.roll(TOKENS, -1, axis=1)


@pytest.mark.parametrize("block", [None, 5])
def test_the_gradient_is_the_sum_of_both_uses(block):
    """Against an untied model whose two matrices are the same."""
    blocks = {"model.head_block_tokens": block}
    tied, untied = make(**TIED, **blocks), make(**ONE_LAYER, **blocks)
    graph, params, other = nnx.split(untied, nnx.Param, ...)
    params["head_VD"] = jax.tree.map(lambda x: x, params["embedding_VD"])
    tied_graph, tied_params, _ = nnx.split(tied, nnx.Param, ...)
    for name in tied_params:
        tied_params[name] = params[name]

    def gradient(graph, params):
        def loss(params):
            model = nnx.merge(graph, params, other)
            return model.score(ModelInputs(TOKENS), TARGETS).nll_BS.mean()

        return jax.jit(jax.value_and_grad(loss), compiler_options=FAST)(params)

    (loss, found), (wanted_loss, apart) = gradient(tied_graph, tied_params), gradient(graph, params)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    wanted = apart["embedding_VD"][...] + apart["head_VD"][...]
    np.testing.assert_allclose(found["embedding_VD"][...], wanted, rtol=1e-4, atol=1e-8)
    assert "head_VD" not in found


def test_it_is_counted_once():
    tied, untied = (config_of(**changes) for changes in (TIED, ONE_LAYER))
    counts = [size.count_parameters(config.model) for config in (tied, untied)]
    assert counts[1].total - counts[0].total == V * 32
    assert counts[1].activated - counts[0].activated == V * 32
    assert counts[0] == size.parameters_by_formula(tied.model)
    # The lookup costs nothing, the head's product the same.
    assert size.train_flops_per_token(tied) == size.train_flops_per_token(untied)


def test_with_mup_the_norm_before_the_head_is_scaled():
    """At twice the base width logits and their updates are those of an untied head."""
    config = config_of(**TIED, **{"model.mup_base_width": 16})
    plain, scaled = (
        nnx.state(build_model(c.model, jax.random.key(0)), nnx.Param)
        for c in (replace(config, **{"model.mup_base_width": None}), config)
    )
    multiples = {
        path: x.mean() / by_path(plain)[path].mean() for path, x in by_path(scaled).items()
    }
    assert multiples["['final_norm']['scale_D'].value"] == 0.5
    assert multiples["['embedding_VD'].value"] == 1.0
    rates = mup.scale_rates(jax.tree.map(jnp.ones_like, plain), 2.0, tied=True)
    rates = {path: float(x.mean()) for path, x in by_path(rates).items()}
    assert rates["['final_norm']['scale_D'].value"] == 0.5
    assert rates["['embedding_VD'].value"] == rates["['layers']['ffn_norm']['scale_D'].value"] == 1
