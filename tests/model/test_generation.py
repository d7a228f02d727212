"""Generation: texts of one batch against a plain pass over each text alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.model import block, generation
from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.generation import generate, prompt_inputs, routing_notes
from dsmoe_jax.model.sampling import Sampling
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe.interventions import GENERATION
from tests.model.tiny_model import V, config_of, make

# Logits far apart: greedy choices that rounding does not change.
SHARP = {"model.initializer_range": 0.5, "model.num_hidden_layers": 2}
SHARP["model.first_k_dense_replace"] = 1
PROMPTS = [[1, 2, 3], [9, 8, 7, 5, 5, 1, 2], [4]]
G = 8
# Nearly all logits are equal here: every token is as likely as any other.
HOT = Sampling(temperature=1e6)


@pytest.fixture(scope="module")
def model():
    return make(**SHARP)


@pytest.fixture(scope="module")
def texts(model):
    return generate(model, PROMPTS, G).tokens_BG


def whole_pass(model):
    """`(tokens) -> logits_SV` of one text alone, without a cache, padded behind: not seen there."""
    graph, state = nnx.split(model)

    @jax.jit
    def logits(state, tokens_BS):
        model = nnx.merge(graph, state)
        return model.forward(ModelInputs(tokens_BS), intervention=GENERATION).logits_BSV

    def of_text(tokens):
        row = jnp.zeros((1, 16), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
        return np.array(logits(state, row)[0, : len(tokens)])

    return of_text


def alone(of_text, prompt, choose=lambda logits_V, text: logits_V.argmax()):
    """The tokens that follow a prompt, each from a pass over the whole text."""
    text = list(prompt)
    for _ in range(G):
        text.append(int(choose(of_text(text)[-1], text)))
    return text[len(prompt) :]


MODELS = {
    "dropping": {"model.moe.evaluation_drop.capacity_factor": 0.5},
    "expert_choice": {"model.moe.router.name": "expert_choice", "model.moe.balance.expert": None},
    "latent": {  # with the absorbed form of its cache
        "model.moe.router.name": "uniform",
        "model.moe.balance.expert": None,
        "model.moe.balance.router_z": None,
        "model.attention.name": "latent",
        "model.attention.num_key_value_heads": None,
        "model.attention.options.kv_lora_rank": 8,
        "model.attention.options.qk_nope_head_dim": 8,
        "model.attention.options.qk_rope_head_dim": 4,
        "model.attention.options.v_head_dim": 8,
    },
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_text_does_not_depend_on_the_others(changes):
    """Beside longer and shorter ones, and from passes over it alone: the same tokens."""
    model = make(**SHARP, **changes)
    of_text = whole_pass(model)
    expected_BG = [alone(of_text, prompt) for prompt in PROMPTS]
    np.testing.assert_array_equal(generate(model, PROMPTS, G).tokens_BG, expected_BG)


def test_prefill_and_decoding_give_the_logits_of_a_whole_pass(model):
    """In a batch of unequal prompts."""
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, inputs, cache):
        return nnx.merge(graph, state).forward(inputs, cache, GENERATION)

    of_text = whole_pass(model)
    inputs = prompt_inputs(PROMPTS, V)
    out = step(state, inputs, model.empty_cache(3, 10))
    texts = [list(prompt) for prompt in PROMPTS]
    for token in (11, 12, 13):
        for row, text in enumerate(texts):
            logits_SV = out.logits_BSV[row, -len(text) :] if token == 11 else out.logits_BSV[row]
            whole_SV = of_text(text)[-len(logits_SV) :]
            np.testing.assert_allclose(logits_SV, whole_SV, atol=2e-5)
            text.append(token + row)
        new_BS = jnp.array([[text[-1]] for text in texts])
        out = step(state, ModelInputs(new_BS), out.cache)
    np.testing.assert_array_equal(out.cache.segment_ids_BL.sum(axis=1), [6, 10, 4])


def test_positions_count_tokens_alone(model):
    """Padding before and between them, and what was taken back, is not counted."""
    ids_BL = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0, 0, 0]])
    cache = model.empty_cache(2, 8)._replace(length=jnp.int32(4), segment_ids_BL=ids_BL)
    inputs = ModelInputs(jnp.zeros((2, 3), jnp.int32), jnp.array([[1, 0, 1], [1, 1, 1]]))
    every = block.inputs_of_every_layer(inputs, cache)
    positions_BS = np.where(every.valid_BS, every.positions_BS, -1)
    np.testing.assert_array_equal(positions_BS, [[4, -1, 5], [1, 2, 3]])
    seen_BSL = every.mask.dense(2, 3)
    np.testing.assert_array_equal(seen_BSL[0, 2], [1, 1, 1, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(seen_BSL[1, 1], [0, 0, 1, 0, 1, 1, 0, 0])


def test_padding_is_sent_to_no_expert(model):
    inputs = prompt_inputs(PROMPTS, V)
    forward = nnx.jit(lambda model, inputs, cache: model.forward(inputs, cache, GENERATION))
    report = forward(model, inputs, model.empty_cache(3, 10)).report
    unassigned = model.config.moe.n_routed_experts
    is_token_BS = np.asarray(inputs.segment_ids_BS) > 0
    ids_BSK = np.asarray(report.recorded.ids)[0]
    assert (ids_BSK[~is_token_BS] == unassigned).all()
    assert (ids_BSK[is_token_BS] < unassigned).all()


def test_a_repetition_penalty_counts_prompt_and_text(model):
    """As transformers' processor does on the tokens so far; padding is none of them."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    process = processors.RepetitionPenaltyLogitsProcessor(1.7)

    def choose(logits_V, text):
        return process(torch.tensor([text]), torch.tensor(logits_V[None]))[0].argmax()

    of_text = whole_pass(model)
    expected_BG = [alone(of_text, prompt, choose) for prompt in PROMPTS]
    found = generate(model, PROMPTS, G, sampling=Sampling(repetition_penalty=1.7))
    np.testing.assert_array_equal(found.tokens_BG, expected_BG)
    assert expected_BG != [alone(of_text, prompt) for prompt in PROMPTS]


def test_a_recorded_routing_has_no_new_text():
    replays = {**MODELS["latent"], "model.moe.router.name": "replay"}
    config = config_of(**replays).model
    model = nnx.merge(abstract_model(config), *model_shapes(config))
    with pytest.raises(ValueError, match=r"'replay': there is no recorded routing for this text"):
        generate(model, [[1]], 1)


def test_samples_follow_the_seed_and_their_number(model):
    prompts = [[1, 2, 3]] * 2 + [[9, 8, 7, 5, 5, 1, 2]]

    def run(seed=0, ids=None):
        tokens_BG = generate(model, prompts, G, sampling=HOT, seed=seed, sample_ids=ids).tokens_BG
        return tokens_BG.tolist()

    first = run()
    assert first == run()
    assert not any(a == b for a, b in zip(first, run(seed=1), strict=True))
    assert first[0] != first[1]
    again = run(ids=[1, 5, 2])
    assert again[0] == first[1]
    assert again[1] not in first
    assert again[2] == first[2]
    # One draw for all steps would repeat one token.
    assert all(len(set(row)) > 4 for row in first)


@pytest.mark.parametrize("sampling", [Sampling(), HOT], ids=["greedy", "hot"])
def test_only_allowed_tokens_are_generated(model, texts, sampling):
    """The others' logits may be anything: rows that no text has trained."""
    allowed_V = ~np.isin(np.arange(V), [*np.unique(texts), *range(0, V, 2)])
    rules = {"sampling": sampling, "allowed_V": allowed_V}
    drawn = generate(model, PROMPTS, G, **rules).tokens_BG
    assert allowed_V[drawn].all()
    broken = nnx.clone(model)
    broken.head_VD[...] = jnp.where(allowed_V[:, None], broken.head_VD[...], jnp.nan)
    np.testing.assert_array_equal(generate(broken, PROMPTS, G, **rules).tokens_BG, drawn)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(model, texts, wrong):
    """Not token 0."""
    broken = nnx.clone(model)
    read = np.isin(np.arange(V), [*np.concatenate(PROMPTS), *texts[:, 0], *texts[:, 1]])
    broken.embedding_VD[...] = jnp.where(read[:, None], broken.embedding_VD[...], wrong)
    unread_G = ~read[texts].all(axis=0)
    assert unread_G.any()
    token = 2 + int(unread_G.argmax())
    with pytest.raises(ValueError, match=rf"logits of generated token {token}: not finite; the mo"):
        generate(broken, PROMPTS, G)


def test_a_text_ends_at_the_end_token(model, texts):
    """The others go on as before, and when all have ended no step is made for them."""
    eos = int(texts[0, 3])
    ends = [row.tolist().index(eos) + 1 if eos in row else G for row in texts]
    calls = []

    def watch(news):
        calls.append([len(tokens) for tokens in news])
        return np.zeros(3, bool)

    ended = generate(model, PROMPTS, G, eos_id=eos, watch=watch, chunk=3)
    assert ended.n_tokens_B.tolist() == ends
    assert min(ends) < G, "a text ends early"
    for row, text, n in zip(ended.tokens_BG, texts, ends, strict=True):
        np.testing.assert_array_equal(row, np.where(np.arange(G) < n, text, 0))
    assert np.sum(calls, axis=0).tolist() == ends
    assert sum(map(max, calls)) == max(ends) < G
    assert generate(model, PROMPTS, G, eos_id=eos, chunk=G).passes == max(ends) - 1


def test_who_watches_may_end_texts(model, texts):
    seen = []

    def watch(news):
        seen.append(news)
        return np.array([len(seen) == 2, False, len(seen) >= 1])

    found = generate(model, PROMPTS, G, watch=watch, chunk=2)
    assert found.n_tokens_B.tolist() == [3, G, 1]
    assert [news[2] for news in seen[1:]] == [[]] * (len(seen) - 1)
    np.testing.assert_array_equal(found.tokens_BG[1], texts[1])
    np.testing.assert_array_equal([t for news in seen for t in news[1]], texts[1])


def test_nothing_is_compiled_again_for_more_tokens(model, texts):
    """Whatever number of tokens one call adds, the program is the same."""
    before = generation._decode._cache_size()
    for chunk in (1, 3, G):
        found = generate(model, PROMPTS, G, chunk=chunk)
        np.testing.assert_array_equal(found.tokens_BG, texts)
    assert generation._decode._cache_size() == before
    assert found.prompt_tokens == sum(map(len, PROMPTS))
    assert found.decoded_tokens == 3 * (G - 1)
    assert all(seconds > 0 for seconds in found.seconds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"prompts": jnp.zeros((1, 0), jnp.int32)}, "prompts=.*at least one of each text"),
        ({"prompts": [[1], []]}, "prompts=.*at least one of each text"),
        ({"prompts": []}, "prompts=.*at least one of each text"),
        ({"prompts": [1, 2]}, "prompts=.*must be token ids"),
        ({"prompts": [[1], [2, V]]}, rf"prompts=\(2, {V}\): smallest .* must be 0 to {V - 1}"),
        ({"prompts": [[-1, 2]]}, r"prompts=\(-1, 2\): smallest"),
        ({"prompts": [[1.0]]}, r"prompts=dtype\('float64'\): must be ids"),
        ({"sample_ids": [0, 1]}, r"sample_ids=\(2,\): must be of shape \(1,\)"),
        ({"allowed_V": np.zeros(V, bool)}, "allowed='none': must allow a token"),
        ({"allowed_V": np.ones(V + 1, bool)}, rf"allowed=\({V + 1},\): must be of shape"),
    ],
)
def test_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[1]], "max_new_tokens": 1, **arguments})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"drop.capacity_factor": 1.0}, []),
        ({"evaluation_drop.capacity_factor": 1.0}, ["nothing is dropped here"]),
        (
            {"router.name": "expert_choice", "num_experts_per_tok": 7},
            ["the expert_choice router routes .* here each token goes to 7 experts of its own"],
        ),
        (
            {"router.name": "base", "num_experts_per_tok": 1},
            ["the base router .* to one expert of its own"],
        ),
        ({"n_routed_experts": 0, "num_experts_per_tok": 0}, []),
    ],
)
def test_another_routing_than_in_training_is_said(changes, found):
    config = replace(Config(), **{f"model.moe.{key}": value for key, value in changes.items()})
    notes = routing_notes(config.model.moe)
    assert len(notes) == len(found)
    for note, pattern in zip(notes, found, strict=True):
        assert re.search(pattern, note)


def test_too_little_memory_is_a_user_error(model, monkeypatch):
    """As a cache of terabytes raises it."""

    def out_of_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2 bytes.")

    monkeypatch.setattr(generation, "_run", out_of_memory)
    with pytest.raises(ValueError, match=r"^max_new_tokens=1000000000: .* 2 x 1000000003 tokens"):
        generate(model, np.zeros((2, 3), np.int32), 10**9)
