"""The Transformer against Hugging Face, and by its behaviour."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.model import block
from dsmoe_jax.model.block import compute_dtype
from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.types import ModelInputs
from tests.model.tiny_model import V, config_of, make

S = 12
TOKENS = jax.random.randint(jax.random.key(5), (2, S), 0, V)


def test_dense_model_agrees_with_hugging_face_llama():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    dense = {"model.moe.n_routed_experts": 0, "model.moe.num_experts_per_tok": 0}
    model = make(**dense, **{"model.moe.moe_intermediate_size": 48})
    c = model.config
    norms = [model.final_norm]
    for layer in (*model.leading, model.layers):
        norms += [layer.attention_norm, layer.ffn_norm]
    for i, norm in enumerate(norms):  # at 1 they could be taken for one another
        noise = jax.random.normal(jax.random.key(i), norm.scale_D[...].shape)
        norm.scale_D[...] = 1 + 0.3 * noise
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=48, rms_norm_eps=c.rms_norm_eps,
            rope_theta=c.attention.rope_theta, tie_word_embeddings=False,
        )
    )  # fmt: skip

    def take(x):
        return torch.tensor(np.asarray(x))

    graph, stacked = nnx.split(model.layers)
    blocks = [*model.leading]
    blocks += [nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(2)]
    reference.model.embed_tokens.weight.data = take(model.embedding_VD[...])
    reference.lm_head.weight.data = take(model.head_VD[...])
    reference.model.norm.weight.data = take(model.final_norm.scale_D[...])
    for ours, theirs in zip(blocks, reference.model.layers, strict=True):
        ffn = ours.ffn if ours.dense else ours.moe.shared
        attention = theirs.self_attn
        theirs.input_layernorm.weight.data = take(ours.attention_norm.scale_D[...])
        theirs.post_attention_layernorm.weight.data = take(ours.ffn_norm.scale_D[...])
        attention.q_proj.weight.data = take(ours.attention.query_NHD[...].reshape(-1, 32))
        attention.k_proj.weight.data = take(ours.attention.key_MHD[...].reshape(-1, 32))
        attention.v_proj.weight.data = take(ours.attention.value_MHD[...].reshape(-1, 32))
        attention.o_proj.weight.data = take(ours.attention.out_DNH[...].reshape(32, -1))
        theirs.mlp.gate_proj.weight.data = take(ffn.gate_FD[...])
        theirs.mlp.up_proj.weight.data = take(ffn.up_FD[...])
        theirs.mlp.down_proj.weight.data = take(ffn.down_DF[...])
    with torch.no_grad():
        want = reference(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    np.testing.assert_allclose(model(TOKENS), want, atol=2e-5)


@pytest.mark.parametrize("begin", [0, 4])  # of the second document; 0: there is one only
def test_causality_by_gradient(gradient_of_logit, begin):
    """Logits at position t depend on the tokens of its document up to t, and on no other."""
    segments = jnp.where(jnp.arange(S) < begin, 1, 2)[None]
    for t in (0, 5, S - 1):
        first = begin if t >= begin else 0
        reached = np.abs(gradient_of_logit(segments, t)).sum(axis=1)[:S] > 0
        seen = np.flatnonzero(reached).tolist()
        assert seen == [*range(first, t + 1)], f"position {t} sees {seen}"


@pytest.fixture(scope="module")
def gradient_of_logit(model):
    """`(segment ids, t) -> gradient` of the logits at t; all tokens differ, row i is position i."""
    tokens = jnp.arange(S)[None]
    graph, params = nnx.split(model)

    def logit(params, segments_BS, t):
        output = nnx.merge(graph, params).forward(ModelInputs(tokens, segments_BS))
        return output.logits_BSV[0, t].sum()

    grad = jax.jit(jax.grad(logit))
    return lambda *args: grad(params, *args).embedding_VD[...]


def test_packed_documents_do_not_see_each_other(model):
    graph, state = nnx.split(model)

    @jax.jit
    def logits(*arrays):
        return nnx.merge(graph, state).forward(ModelInputs(*arrays)).logits_BSV

    one_document = jnp.ones((2, S), jnp.int32), jnp.tile(jnp.arange(S), (2, 1))
    alone = logits(TOKENS, *one_document)
    packed = jnp.concatenate([TOKENS[:1, :5], TOKENS[1:, :7]], axis=1)
    packed = jnp.tile(packed, (2, 1))
    segments = jnp.array([[1] * 5 + [2] * 7] * 2)
    positions = jnp.array([[*range(5), *range(7)]] * 2)
    together, _ = logits(packed, segments, positions)
    np.testing.assert_allclose(together[:5], alone[0, :5], atol=1e-5)
    np.testing.assert_allclose(together[5:], alone[1, :7], atol=1e-5)
    unmasked, _ = logits(packed, *one_document)
    assert jnp.abs(unmasked[5:] - together[5:]).max() > 1e-2  # the mask matters


def test_padding_is_not_counted(model):
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    logged = model.forward(ModelInputs(TOKENS, segments)).report.logged
    np.testing.assert_array_equal(logged.tokens, [21, 21])
    np.testing.assert_array_equal(logged.load_E.sum(axis=1), [42, 42])


def test_layers_draw_different_noise():
    model = make(**{"model.moe.router.name": "reinforce"})
    model.layers.moe.router_ED[...] *= 0  # what is drawn is the noise's doing alone
    output = model.forward(ModelInputs(TOKENS, rng=jax.random.key(0)))
    first, second = output.report.logged.load_E
    assert (first != second).any()


def test_unrolled_layers_give_what_scanned_ones_give(model, monkeypatch):
    graph, params = nnx.split(model)
    inputs = ModelInputs(TOKENS, rng=jax.random.key(1))

    def loss(params):
        output = nnx.merge(graph, params).forward(inputs)
        return jnp.square(output.logits_BSV).mean(), output.report

    def results(most_layers: int, at_once: int):
        monkeypatch.setattr("dsmoe_jax.model.scanned.UNROLLED_LAYERS", most_layers)
        step = jax.value_and_grad(lambda params: loss(params), has_aux=True)
        assert f"unroll={at_once}\n" in str(jax.make_jaxpr(step)(params))
        return jax.jit(step)(params)

    n = model.n_scanned
    scanned, unrolled = results(n - 1, at_once=1), results(n, at_once=n)
    chex.assert_trees_all_close(unrolled, scanned, rtol=1e-5, atol=1e-7)


def test_cache_gives_the_same_logits(model):
    cache = model.empty_cache(2, S + 3)
    graph, params = nnx.split(model)

    @jax.jit
    def step(params, tokens, cache):
        return nnx.merge(graph, params).forward(ModelInputs(tokens), cache)

    out = step(params, TOKENS[:, :4], cache)
    logits = [out.logits_BSV]
    for i in range(4, S):
        out = step(params, TOKENS[:, i : i + 1], out.cache)
        logits.append(out.logits_BSV)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), model(TOKENS), atol=1e-5)
    assert out.cache.length == S


def test_program_size_does_not_grow_with_depth():
    def size(layers):
        config = config_of(**{"model.num_hidden_layers": layers}).model
        graph, shapes = abstract_model(config), model_shapes(config)

        def run(params, other):
            return nnx.merge(graph, params, other)(TOKENS)

        return len(str(jax.make_jaxpr(run)(*shapes)).splitlines())

    assert size(3) == size(9)


def test_initialisation_is_the_papers():
    """Every matrix from N(0, 0.006^2), norms at 1, all float32 (V1 section 4.1.3)."""
    model = make(**{"model.initializer_range": 0.006, "model.hidden_size": 64})
    for path, leaf in jax.tree.leaves_with_path(nnx.state(model, nnx.Param)):
        assert leaf.dtype == jnp.float32
        if "scale" in jax.tree_util.keystr(path):
            assert (leaf == 1).all()
        else:
            assert abs(float(leaf.std()) - 0.006) < 6e-4, path
            assert abs(float(leaf.mean())) < 6e-4, path


def test_stacked_layers_start_different(model):
    gate = model.layers.moe.gate_EFD[...]
    assert gate.shape == (2, 6, 16, 32)
    assert jnp.abs(gate[0] - gate[1]).max() > 0.01
    assert jnp.abs(gate[0, 0] - gate[0, 1]).max() > 0.01


def test_bfloat16_compute_keeps_float32_parameters(model):
    half = make(**{"model.compute_dtype": "bfloat16"})
    assert half.embedding_VD[...].dtype == jnp.float32
    logits = half(TOKENS)
    assert logits.dtype == jnp.float32
    difference = jnp.abs(logits - model(TOKENS)).max()
    assert 0 < difference < 0.1 * jnp.abs(logits).max()
    assert half.empty_cache(1, 1).stacked.keys_BLMH.dtype == jnp.bfloat16


def test_bfloat16_logits_are_sums_in_float32():
    """Rounded ones would be off by 0.06 at 22, and the best tokens of a row would tie."""
    model = make(**{"model.compute_dtype": "bfloat16", "model.vocab_size": 512})
    head_VD = model.head_VD[...]
    model.head_VD[...] = jnp.eye(512, 32)
    input_BSD = np.asarray(model(TOKENS)[:, :, :32], np.float64)
    model.head_VD[...] = head_VD
    w_VD = np.asarray(head_VD.astype(jnp.bfloat16), np.float64)
    eps = 32 * np.finfo(np.float32).eps * (np.abs(input_BSD) @ np.abs(w_VD).T)
    want = input_BSD @ w_VD.T
    found = np.asarray(model(TOKENS), np.float64)
    assert (np.abs(found - want) <= eps).all()
    assert (found.astype(jnp.bfloat16) != found).mean() > 0.9


def test_compute_dtype_follows_the_platform(monkeypatch):
    for platform, dtype in (("cpu", jnp.float32), ("tpu", jnp.bfloat16), ("gpu", jnp.bfloat16)):
        monkeypatch.setattr(block, "platform", lambda name=platform: name)
        assert compute_dtype(config_of().model) == dtype
        assert compute_dtype(config_of(**{"model.compute_dtype": "float32"}).model) == jnp.float32
