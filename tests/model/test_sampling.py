"""Generation: the cache loop against a plain loop, and the sampling rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.model.sampling import generate, sample
from tests.model.tiny_model import greedy, make


@pytest.fixture(scope="module")
def model():
    # Logits far apart: greedy choices that rounding does not change.
    return make(**{"model.initializer_range": 0.5, "model.num_hidden_layers": 3})


def test_greedy_equals_recomputing_the_whole_sequence(model):
    prompt = jnp.array([[1, 2, 3], [9, 8, 7]])
    np.testing.assert_array_equal(generate(model, prompt, 4), greedy(model, prompt, 4))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"prompt_BP": jnp.zeros((1, 0), jnp.int32)}, "prompt=.*at least one token"),
    ],
)
def test_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt_BP": jnp.array([[1]]), "max_new_tokens": 1, **arguments})
