"""Sampling of the next token: against transformers' processors, and at the limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.model.sampling import Sampling, filtered, penalised, sample

N = 500  # keys of `drawn`


@pytest.fixture(scope="module")
def drawn():
    """`drawn(logits, temperature=..., ...)`: a token of each of N keys for each row of logits."""
    keys_N = jax.random.split(jax.random.key(0), N)

    def draw(logits, **rules):
        logits = jnp.atleast_2d(jnp.asarray(logits, jnp.float32))
        tiled = jnp.repeat(logits, N, axis=0)
        keys = jnp.tile(keys_N, len(logits))
        return np.asarray(sample(tiled, keys, Sampling(**rules))).reshape(len(logits), N)

    return draw


B, V = 16, 50
LOGITS_BV = np.random.default_rng(0).normal(size=(B, V)).astype(np.float32) * 3
SEEN_BS = np.random.default_rng(1).integers(0, V, (B, 20))
RULES = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"temperature": 2.5, "top_k": 20, "top_p": 0.9},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5, "temperature": 1.7, "top_k": 7, "top_p": 0.6},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_distribution_is_that_of_transformers(rules):
    """Its processors, in the order in which its `generate` applies them."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    sampling = Sampling(**{"temperature": 1.0, **rules})
    steps = [
        processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        processors.TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k is not None:
        steps.append(processors.TopKLogitsWarper(sampling.top_k))
    steps.append(processors.TopPLogitsWarper(sampling.top_p))
    theirs = processors.LogitsProcessorList(steps)(torch.tensor(SEEN_BS), torch.tensor(LOGITS_BV))
    seen_BV = (SEEN_BS[:, :, None] == np.arange(V)).any(axis=1)
    ours = penalised(jnp.asarray(LOGITS_BV), jnp.asarray(seen_BV), sampling.repetition_penalty)
    ours_BV = jax.nn.softmax(filtered(ours, sampling))
    np.testing.assert_allclose(ours_BV, torch.softmax(theirs, dim=-1).numpy(), atol=1e-6)
    assert ((ours_BV > 0) == (theirs.numpy() > -np.inf)).all()


def test_tokens_are_drawn_from_that_distribution(drawn):
    logits = np.array([2.0, 1.0, 0.0, -1.0])
    rules = {"temperature": 2.0, "top_k": 3}
    shares = np.bincount(drawn(logits, **rules)[0], minlength=4) / N
    expected = np.exp(logits / 2) * [1, 1, 1, 0]
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.07)


def test_a_text_has_random_numbers_of_its_own():
    """Other rows, or more of them, change nothing."""
    keys_B = jax.random.split(jax.random.key(3), B)
    hot = Sampling(temperature=3.0)
    together_B = sample(jnp.asarray(LOGITS_BV), keys_B, hot)
    alone_B = [sample(LOGITS_BV[i : i + 1], keys_B[i : i + 1], hot)[0] for i in range(4)]
    np.testing.assert_array_equal(together_B[:4], alone_B)


def test_greedy_knows_the_penalty_too():
    logits = jnp.array([[3.0, 2.9, -5.0], [-1.0, -1.1, -5.0]])
    seen = jnp.array([[True, False, False]] * 2)
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(logits, keys, Sampling(repetition_penalty=1.2), seen).tolist() == [1, 1]
    assert sample(logits, keys, Sampling(repetition_penalty=1.01), seen).tolist() == [0, 0]


def test_tokens_as_likely_as_the_last_of_top_k_stay(drawn):
    assert set(drawn([1.0, 3.0, 1.0, 0.0], temperature=1.0, top_k=2)[0]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(1.0, {0, 1, 2, 3}), (0.75, {0, 2}), (0.3, {2}), (0.80001, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(drawn, top_p, allowed):
    logits = np.log([0.3, 0.15, 0.5, 0.05])
    assert set(drawn(logits, temperature=1.0, top_p=top_p)[0]) == allowed


def test_top_p_stops_where_the_sum_is_reached_exactly(drawn):
    assert len(set(drawn(np.zeros(4), temperature=1.0, top_p=0.5)[0])) == 2


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-200])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_near_0_is_greedy(drawn, temperature, top_p):
    """Also where float32 has no such number; equal logits keep equal chances."""
    logits = [[-60.0, 22.0, 22.0001, -np.inf], [3e38, -3e38, 0.0, 1.0], [1.0, 7.0, -1.0, 7.0]]
    found = drawn(logits, temperature=temperature, top_p=top_p)
    assert [set(row) for row in found[:2]] == [{2}, {0}]
    assert set(found[2]) == ({1, 3} if top_p == 1 else {1})


@pytest.mark.parametrize("temperature", [1e38, 1e300])
def test_a_temperature_without_end_draws_all_tokens_but_the_forbidden(drawn, temperature):
    assert set(drawn([5.0, -np.inf, 0.0], temperature=temperature)[0]) == {0, 2}


@pytest.mark.parametrize("top_p", [1e-7, 1e-300])
def test_top_p_near_0_keeps_the_best(drawn, top_p):
    assert set(drawn([0.0, 0.1, 0.3, 0.2], temperature=1.0, top_p=top_p)[0]) == {2}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0: must be >= 0"),
        ({"temperature": float("nan")}, r"temperature=nan: must be finite"),
        ({"temperature": float("inf")}, r"temperature=inf: must be finite"),
        ({"top_p": 0.0}, r"top_p=0\.0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"top_k": 0}, r"top_k=0: must be > 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0: must be above 0"),
        ({"repetition_penalty": float("inf")}, r"repetition_penalty=inf"),
    ],
)
def test_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**rules)
