"""The tables and the explorer of every newer kind of model.

Shapes: T tokens, L MoE layers, K columns of a routing, E routed experts.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.analysis import tables
from dsmoe_jax.analysis.routed_text import layer_weights, route_text
from dsmoe_jax.config import replace
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.model.build import build_model
from dsmoe_jax.report import analysis_page, explorer
from dsmoe_jax.training import router_state
from tests.tools.tiny import tiny

E, TOKENS = 4, 700
KINDS = {
    # MoE layers 2 and 4 of five, latent attention, multi-token prediction, identity experts.
    "newest": {
        "model.num_hidden_layers": 5,
        "model.first_k_dense_replace": 1,
        "model.moe_layer_freq": 2,
        "model.mtp.num_nextn_predict_layers": 1,
        "model.attention.name": "latent",
        "model.attention.num_key_value_heads": None,
        "model.attention.options.kv_lora_rank": 8,
        "model.attention.options.qk_nope_head_dim": 8,
        "model.attention.options.qk_rope_head_dim": 4,
        "model.attention.options.v_head_dim": 8,
        "model.moe.n_identity_experts": 3,
        "model.moe.num_experts_per_tok": 3,
        "model.moe.router.bias_update_speed": 0.01,
        "model.moe.balance.expert": None,
    },
    # No column of a routing is the token's own choice.
    "token_table": {
        "model.moe.router.name": "token_table",
        "model.moe.router.scoring_func": "sqrtsoftplus",
        "model.moe.balance": {},
    },
}


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return load_corpus(tiny_corpus)


def model_of(config, corpus):
    model = build_model(config.model, jax.random.key(0))
    counts_V = np.arange(corpus.vocab_size)
    values = router_state.first_values(config.model, lambda: counts_V)
    graph, params, other = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, params, router_state.fill(other, values))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_explorer(kind, corpus):
    config = replace(tiny(), **KINDS[kind])
    model = model_of(config, corpus)
    text = route_text(model, corpus, max_tokens=TOKENS)
    k = config.model.moe.num_experts_per_tok
    assert text.ids_LTK.shape == (len(config.model.moe_layers), TOKENS, k)
    served_LTK = text.ids_LTK < E
    assert text.ids_LTK.max() <= E
    assert (text.gates_LTK[~served_LTK] == 0).all()
    missing = not served_LTK.all()
    assert missing == bool(config.model.moe.n_identity_experts)

    weights = layer_weights(model, corpus, sample=20)
    assert [len(layer.outputs_ETD) for layer in weights] == [E] * text.n_layers
    earlier = text.ids_LTK[:, :100]
    found = tables.compute(tables.Subject(text, weights, {"step 1": earlier}))
    assert found["load"]["load"] == [
        np.bincount(ids[ids < E], minlength=E).tolist() for ids in text.ids_LTK
    ]
    assert found["saturation"] == {"step 1": [1.0] * text.n_layers}
    assert set(found) == set(tables.TABLES)
    json.dumps(found, allow_nan=False)
    assert analysis_page.blocks({"run": found}, "command", {"run": "run.html"})
    page = explorer.explorer_data({"run": text}, corpus.tokenizer)
    assert np.shape(page["runs"][0]["load"]) == (text.n_layers, E)
