"""Domain specialisation against scipy and sampling, and its extremes."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from dsmoe_jax.runs.summaries import MIN_DOMAIN_TOKENS, domain_specialisation

ENOUGH = MIN_DOMAIN_TOKENS


def specialisation(load_GLE):
    return domain_specialisation(np.asarray(load_GLE), np.full(len(load_GLE), ENOUGH))


def plug_in(p_GE):
    """Entropy of the mean minus mean of the entropies, over ln G."""
    return (entropy(p_GE.mean(axis=0)) - entropy(p_GE, axis=1).mean()) / np.log(len(p_GE))


def shares(n_domains, n_experts):
    return np.random.default_rng(0).dirichlet(np.full(n_experts, 2.0), n_domains)


def test_with_many_tokens_it_is_scipys_divergence():
    p_GLE = np.stack([shares(2, 9), shares(4, 9)[2:]], axis=1)
    found = specialisation(np.round(1e12 * p_GLE))
    wanted = [jensenshannon(*p_GE, base=2) ** 2 for p_GE in p_GLE.swapaxes(0, 1)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    p_GE = shares(5, 9)
    np.testing.assert_allclose(
        specialisation(np.round(1e12 * p_GE)[:, None]), [plug_in(p_GE)], rtol=1e-6
    )


def test_extremes():
    one_domain_each = np.kron(np.eye(3), [[5, 2, 0, 9]])  # an expert that nobody uses too
    same = np.tile([[7, 1, 0, 30]], (3, 1)) * [[1], [10], [100]]
    assert specialisation(one_domain_each[:, None]) == [pytest.approx(1.0, abs=1e-12)]
    assert specialisation(same[:, None]) == [0.0]
    # Two experts cannot tell four domains apart: half of the information at most.
    assert specialisation([[[9000, 0]], [[9000, 0]], [[0, 9000]], [[0, 9000]]]) == [
        pytest.approx(0.5, abs=1e-4)
    ]


def test_names_and_sizes_of_domains_and_experts_do_not_matter():
    rng = np.random.default_rng(1)
    load_GLE = rng.integers(0, 50, (4, 2, 6))
    found = specialisation(load_GLE)
    order = rng.permutation(6)
    np.testing.assert_allclose(specialisation(load_GLE[[2, 0, 3, 1]][..., order]), found)
    larger = load_GLE * np.array([1, 10, 100, 1000])[:, None, None]
    large = 1000 * load_GLE
    assert abs(specialisation(larger)[0] - specialisation(large)[0]) < 0.05 * found[0]


def test_a_small_sample_does_not_look_specialised():
    """The mean over many samples is the value of the shares that they were drawn from."""
    rng = np.random.default_rng(2)
    p_GE = 0.8 / 16 + 0.2 * shares(4, 16)
    sizes = [500, 500, 1000, 4000]
    samples = [
        np.stack([rng.multinomial(n, p_E) for n, p_E in zip(sizes, p_GE, strict=True)])
        for _ in range(400)
    ]
    true = plug_in(p_GE)
    naive = np.mean([plug_in(load_GE / load_GE.sum(1, keepdims=True)) for load_GE in samples])
    corrected = np.mean([specialisation(load_GE[:, None]) for load_GE in samples])
    assert naive - true > 0.3 * true
    assert abs(corrected - true) < 0.05 * (naive - true)


def test_a_small_domain_is_left_out_and_a_single_one_has_no_number():
    load_GLE = np.random.default_rng(3).integers(1, 50, (3, 2, 6))
    tokens = np.array([ENOUGH, ENOUGH - 1, ENOUGH])
    assert domain_specialisation(load_GLE, tokens) == specialisation(load_GLE[[0, 2]])
    assert domain_specialisation(load_GLE, tokens - 1) is None
    assert domain_specialisation(load_GLE[:1], tokens[:1]) is None
    load_GLE[2, 1] = 0  # a layer whose experts chose no token of the domain
    assert domain_specialisation(load_GLE, np.full(3, ENOUGH)) == specialisation(load_GLE[:2])
