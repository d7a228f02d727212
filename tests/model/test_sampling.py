"""Generation: the cache loop against a plain loop, and the sampling rules."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.model import sampling
from dsmoe_jax.model.sampling import generate, routing_notes, sample
from tests.model.tiny_model import V, greedy, make


@pytest.fixture(scope="module")
def model():
    # Logits far apart: greedy choices that rounding does not change.
    return make(**{"model.initializer_range": 0.5, "model.num_hidden_layers": 3})


def test_greedy_equals_recomputing_the_whole_sequence(model):
    prompt = jnp.array([[1, 2, 3], [9, 8, 7]])
    np.testing.assert_array_equal(generate(model, prompt, 4), greedy(model, prompt, 4))


TOGETHER = {
    "dropping": {"model.moe.evaluation_drop.capacity_factor": 0.5},
    "expert_choice": {"model.moe.router.name": "expert_choice", "model.moe.balance.expert": None},
    "uniform": {
        "model.moe.router.name": "uniform",
        "model.moe.balance.expert": None,
        "model.moe.balance.router_z": None,
    },
}


@pytest.mark.parametrize("changes", TOGETHER.values(), ids=TOGETHER)
def test_a_text_does_not_depend_on_the_others(changes):
    """Alone, beside others, four times, and from a pass over the whole text: the same tokens."""
    model = make(**{"model.initializer_range": 0.5, "model.num_hidden_layers": 3, **changes})
    prompts_BP = jax.random.randint(jax.random.key(1), (3, 6), 0, 64)
    alone_BG = np.concatenate([generate(model, prompt_P[None], 8) for prompt_P in prompts_BP])
    np.testing.assert_array_equal(generate(model, prompts_BP, 8), alone_BG)
    same_BG = generate(model, jnp.tile(prompts_BP[:1], (3, 1)), 8)
    np.testing.assert_array_equal(same_BG, np.tile(alone_BG[:1], (3, 1)))
    np.testing.assert_array_equal(greedy(model, prompts_BP, 8), alone_BG)


def test_a_recorded_routing_has_no_new_text():
    replays = {**TOGETHER["uniform"], "model.moe.router.name": "replay"}
    with pytest.raises(ValueError, match=r"'replay': there is no recorded routing for this text"):
        generate(make(**replays), jnp.array([[1]]), 1)


def test_sampling_is_reproducible_and_follows_the_seed(model):
    prompt = jnp.array([[1, 2, 3]])

    def run(seed):
        return generate(model, prompt, 12, temperature=1.5, seed=seed)

    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).any()


def test_every_token_is_drawn_anew(model):
    """Hot enough that the logits do not matter: one draw for all steps would repeat one token."""
    (tokens,) = generate(model, jnp.array([[1, 2, 3]]), 12, temperature=1e6)
    assert len(set(tokens.tolist())) > 4


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(1.0, {0, 1, 2, 3}), (0.75, {0, 2}), (0.3, {2}), (0.80001, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, allowed):
    logits = jnp.log(jnp.array([0.3, 0.15, 0.5, 0.05]))
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = jax.vmap(lambda key: sample(logits[None], key, 1.0, top_p)[0])(keys)
    assert set(np.asarray(drawn).tolist()) == allowed


def test_top_p_stops_where_the_sum_is_reached_exactly():
    keys = jax.random.split(jax.random.key(0), 100)
    drawn = jax.vmap(lambda key: sample(jnp.zeros((1, 4)), key, 1.0, 0.5)[0])(keys)
    assert len(set(np.asarray(drawn).tolist())) == 2


def test_top_p_looks_at_the_probabilities_at_the_temperature():
    """At temperature 1 the best token alone has 0.9; at 4 about half."""
    logits = jnp.log(jnp.array([[0.9, 0.06, 0.04]]))
    keys = jax.random.split(jax.random.key(0), 200)
    for temperature, allowed in ((1.0, {0}), (4.0, {0, 1})):
        drawn = jax.vmap(lambda key, t=temperature: sample(logits, key, t, 0.7)[0])(keys)
        assert set(np.asarray(drawn).tolist()) == allowed


def test_temperature_sharpens():
    logits = jnp.array([[0.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 500)
    share = [
        float(jax.vmap(lambda key, t=t: sample(logits, key, t, 1.0)[0])(keys).mean())
        for t in (0.25, 4.0)
    ]
    np.testing.assert_allclose(share, [1 / (1 + np.exp(-4)), 1 / (1 + np.exp(-0.25))], atol=0.06)


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-38, 1e-45, 1e-200])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_near_0_is_greedy(temperature, top_p):
    """Also where float32 has no such number; equal logits keep equal chances."""
    logits = jnp.array([[-60.0, 22.0, 22.0001, -jnp.inf], [3e38, -3e38, 0.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 20)
    drawn = jax.vmap(lambda key: sample(logits, key, temperature, top_p))(keys)
    np.testing.assert_array_equal(drawn, np.tile([2, 0], (20, 1)))
    equal = jnp.array([[1.0, 7.0, 7.0]])
    drawn = jax.vmap(lambda key: sample(equal, key, temperature, 1.0)[0])(keys)
    assert set(np.asarray(drawn).tolist()) == {1, 2}


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e300])
def test_a_temperature_without_end_draws_all_tokens_but_the_forbidden(temperature):
    logits = jnp.array([[5.0, -jnp.inf, 0.0]])
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = jax.vmap(lambda key: sample(logits, key, temperature, 1.0)[0])(keys)
    assert set(np.asarray(drawn).tolist()) == {0, 2}


@pytest.mark.parametrize("top_p", [1e-7, 1e-45, 1e-300])
def test_top_p_near_0_keeps_the_best(top_p):
    drawn = sample(jnp.array([[0.0, 0.1, 0.3, 0.2]]), jax.random.key(0), 1.0, top_p)
    assert drawn.tolist() == [2]


@pytest.mark.parametrize("temperature", [0.0, 1e30])
def test_only_allowed_tokens_are_generated(model, temperature):
    """The others' logits may be anything: rows that no text has trained."""
    prompt = jnp.array([[1, 2, 3], [4, 5, 6]])
    best = np.unique(generate(model, prompt, 8))
    allowed_V = ~np.isin(np.arange(V), [*best, *range(0, V, 2)])
    drawn = generate(model, prompt, 8, temperature=temperature, allowed_V=allowed_V)
    assert allowed_V[drawn].all()
    assert temperature == 0 or len(np.unique(drawn)) > 8
    broken = nnx.clone(model)
    broken.head_VD[...] = jnp.where(allowed_V[:, None], broken.head_VD[...], jnp.nan)
    again = generate(broken, prompt, 8, temperature=temperature, allowed_V=allowed_V)
    np.testing.assert_array_equal(again, drawn)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(model, wrong, temperature):
    """Not token 0."""
    broken = nnx.clone(model)
    broken.embedding_VD[...] = jnp.full_like(broken.embedding_VD[...], wrong).at[:4].set(0.1)
    with pytest.raises(ValueError, match=r"logits of generated token 2: not finite; the model"):
        generate(
            broken, jnp.array([[1, 2, 3]]), 3, temperature=temperature, allowed_V=np.arange(V) > 3
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"prompt_BP": jnp.zeros((1, 0), jnp.int32)}, "prompt=.*at least one token"),
        (
            {"prompt_BP": jnp.array([[1, V]])},
            rf"prompt=\(1, {V}\): smallest .* must be 0 to {V - 1}",
        ),
        ({"prompt_BP": jnp.array([1, 2])}, r"prompt=\(2,\): must be \(B, P\)"),
        ({"prompt_BP": jnp.zeros((0, 2), jnp.int32)}, r"prompt=\(0, 2\): must be \(B, P\)"),
        ({"prompt_BP": jnp.array([[1.0]])}, r"prompt=dtype\('float32'\): must be ids"),
        ({"prompt_BP": jnp.array([[-1, 2]])}, r"prompt=\(-1, 2\): smallest"),
        ({"allowed_V": np.zeros(V, bool)}, "allowed='none': must allow a token"),
        ({"allowed_V": np.ones(V + 1, bool)}, rf"allowed=\({V + 1},\): must be of shape"),
    ],
)
def test_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt_BP": jnp.array([[1]]), "max_new_tokens": 1, **arguments})


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

    monkeypatch.setattr(sampling, "_run", out_of_memory)
    with pytest.raises(ValueError, match=r"^max_new_tokens=1000000000: .* 2 x 1000000003 tokens"):
        generate(model, jnp.zeros((2, 3), jnp.int32), 10**9)
