"""Dense layers between MoE layers: which layer is what, and that the model runs them in order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_jax.config import ModelConfig, replace
from dsmoe_jax.model import block, layout, size
from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.generation import generate
from dsmoe_jax.model.types import ModelInputs
from tests.model.tiny_model import V, config_of, greedy, make

FAST = {"xla_cpu_use_fusion_emitters": False}  # compiles in a third of the time
TOKENS = jax.random.randint(jax.random.key(5), (2, 8), 0, V)
# Leading dense layers 0 and 1, MoE layers 2, 4 and 6; two groups alike, and a shorter one.
BETWEEN = {
    "model.num_hidden_layers": 7,
    "model.first_k_dense_replace": 1,
    "model.moe_layer_freq": 2,
    "model.moe.router.bias_update_speed": 0.001,
}


@st.composite
def layer_configs(draw):
    layers = draw(st.integers(1, 9))
    freq = draw(st.integers(1, 4))
    settings = {
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, layers - 1)),
        "moe_layer_freq": freq,
        "moe_layer_offset": draw(st.integers(0, freq - 1)),
        "mlp_only_layers": tuple(draw(st.sets(st.integers(0, layers - 1), max_size=3))),
    }
    return settings


@given(layer_configs())
def test_every_layer_has_its_place(settings):
    """By a plain loop over the layers and the rules of the class."""
    layers, freq = settings["num_hidden_layers"], settings["moe_layer_freq"]
    kinds = [
        i >= settings["first_k_dense_replace"]
        and i % freq == settings["moe_layer_offset"]
        and i not in settings["mlp_only_layers"]
        for i in range(layers)
    ]
    if not any(kinds):
        with pytest.raises(ValueError, match="every layer is dense"):
            ModelConfig(**settings)
        return
    config = ModelConfig(**settings)
    places = layout.places(config)
    assert [place.path[-1] == "layers" for place in places] == kinds
    assert len(set(places)) == layers == len(places)
    assert sum(run.groups * (1 + run.dense) for run in layout.runs(config)) == layers - sum(
        place.path[0] == "leading" for place in places
    )
    if not settings["mlp_only_layers"]:
        assert len(layout.runs(config)) <= 2


@pytest.mark.parametrize(
    ("qwen", "ours"),
    [
        ({"decoder_sparse_step": 2}, {"moe_layer_freq": 2, "moe_layer_offset": 1}),
        (
            {"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]},
            {"mlp_only_layers": (0, 3)},
        ),
    ],
)
def test_layers_are_those_of_hugging_face(qwen, ours):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 5, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8}
    sizes |= {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
    theirs = transformers.Qwen3MoeModel(transformers.Qwen3MoeConfig(**sizes, **qwen))
    found = [i for i, layer in enumerate(theirs.layers) if hasattr(layer.mlp, "experts")]
    assert ModelConfig(num_hidden_layers=5, **ours).moe_layers == tuple(found)


def test_impossible_layers_are_refused():
    with pytest.raises(ValueError, match=r"model\.moe_layer_freq=0: must be > 0"):
        ModelConfig(moe_layer_freq=0)
    with pytest.raises(ValueError, match=r"moe_layer_offset=2: .*below moe_layer_freq=2"):
        ModelConfig(moe_layer_freq=2, moe_layer_offset=2)
    with pytest.raises(ValueError, match=r"mlp_only_layers=\(9,\): must be layers from 0 to 8"):
        ModelConfig(mlp_only_layers=(9,))


@pytest.fixture(scope="module")
def between():
    return make(**BETWEEN)


def block_at(model, place):
    """A layer as a module of its own."""
    for key in place.path:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    if place.index is None:
        return model
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x[place.index], state))


def test_values_and_gradients_are_those_of_a_plain_loop(between, monkeypatch):
    monkeypatch.setattr("dsmoe_jax.model.scanned.UNROLLED_LAYERS", 0)
    graph, params, other = nnx.split(between, nnx.Param, ...)

    def by_scan(model):
        output = model.forward(ModelInputs(TOKENS))
        return output.logits_BSV, output.report.logged.load_E

    def by_loop(model):
        every = block.inputs_of_every_layer(ModelInputs(TOKENS), None)
        x_BSD = model.embedding_VD[...][TOKENS]
        loads = []
        for place in layout.places(model.config):
            one = block.OneLayer()
            x_BSD, report, _ = block_at(model, place)(x_BSD, every, one)
            if report is not None:
                loads.append(report.logged.load_E)
        logits_BSV = jnp.einsum("bsd,vd->bsv", model.final_norm(x_BSD), model.head_VD[...])
        return logits_BSV, jnp.stack(loads)

    def results(run):
        def loss(params):
            logits_BSV, load_LE = run(nnx.merge(graph, params, other))
            return jnp.square(logits_BSV).mean(), (logits_BSV, load_LE)

        return jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)(params)

    (got, (logits, load)), (want, (wanted_logits, wanted_load)) = map(results, (by_scan, by_loop))
    np.testing.assert_array_equal(load, wanted_load)
    assert load.shape == (3, 6)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-6)
    for found, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-7)


def test_parameters_by_formula_are_those_of_the_module():
    for changes in ({}, {"model.tie_word_embeddings": True}):
        model = config_of(**BETWEEN, **changes).model
        assert size.count_parameters(model) == size.parameters_by_formula(model)


def test_generation_with_the_cache_equals_recomputing(between):
    assert between.config.moe_layers == (2, 4, 6)
    prompt = TOKENS[:, :3]
    np.testing.assert_array_equal(
        generate(between, prompt, 4).tokens_BG, greedy(between, prompt, 4)
    )


def test_program_size_does_not_grow_with_depth():
    def lines(layers):
        config = replace(config_of(**BETWEEN), **{"model.num_hidden_layers": layers}).model
        shapes = model_shapes(config)
        graph = abstract_model(config)

        def run(params, other):
            return nnx.merge(graph, params, other)(TOKENS)

        return len(str(jax.make_jaxpr(run)(*shapes)).splitlines())

    assert lines(13) == lines(21)
