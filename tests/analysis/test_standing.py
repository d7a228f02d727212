"""Standing committees against hand-made routings with known answers, and by their properties.

Shapes: as in dsmoe_jax/analysis/standing.py; K columns of a routing.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from dsmoe_jax.analysis import committee, standing
from dsmoe_jax.analysis.routed_text import RoutedText


@st.composite
def all_shares(draw):
    """Shares of up to 12 experts in up to 4 groups, more or less alike."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_groups, n_experts = draw(st.tuples(st.integers(1, 4), st.integers(1, 12)))
    own_GE = rng.dirichlet(np.full(n_experts, draw(st.sampled_from([0.3, 3.0]))), n_groups)
    common_E = rng.dirichlet(np.ones(n_experts))
    return 0.5 * own_GE + 0.5 * common_E


@given(all_shares())
def test_every_group_has_half_and_not_without_the_last_one(share_GE):
    members, size = standing.standing(share_GE)
    assert len(set(members)) == len(members)
    assert (share_GE[:, members].sum(axis=1) >= 0.5 - 1e-9).all()
    assert (share_GE[:, members[:-1]].sum(axis=1) < 0.5).any()
    assert len(members) - 1 < size <= len(members)
    if len(share_GE) == 1:
        assert members == committee.committee(share_GE[0])


def test_it_is_hardly_larger_than_the_smallest():
    """Against the exact smallest set of an integer program."""
    rng = np.random.default_rng(0)
    for concentration in (2.0, 20.0):
        share_GE = 0.2 * rng.dirichlet(np.full(30, 3.0), 8) + 0.8 * rng.dirichlet(
            np.full(30, concentration)
        )
        half = LinearConstraint(share_GE, lb=0.5)
        exact = milp(np.ones(30), constraints=half, integrality=1, bounds=Bounds(0, 1)).fun
        assert exact <= len(standing.standing(share_GE)[0]) <= exact + 1


def test_known_sizes():
    assert standing.standing(np.full((3, 8), 1 / 8)) == ([0, 1, 2, 3], pytest.approx(4))
    # One expert has 0.4 of both groups; each group has a second one of its own, with 0.2.
    share_GE = np.array([[0.4, 0.2, 0.0, 0.4], [0.0, 0.2, 0.4, 0.4]])
    members, size = standing.standing(share_GE)
    assert sorted(members) == [1, 3]
    assert size == pytest.approx(1.5)


def test_experts_of_a_domain_by_their_largest_multiple():
    share_GE = np.array([[0.5, 0.5, 0.0], [0.5, 0.1, 0.4], [0.5, 0.0, 0.5]])
    assert standing.specific(share_GE) == pytest.approx([1.0, 2.5, 5 / 3])
    assert standing.specific(np.zeros((2, 2))).tolist() == [0, 0]


def routed(ids_ST, domain_S, n_experts, tokens_ST=None):
    """A text of one layer with one expert a token and gates of 1."""
    n_sequences, length = ids_ST.shape
    sequence_T = np.repeat(np.arange(n_sequences), length)
    ids_LTK = ids_ST.reshape(1, -1, 1).astype(np.int32)
    nothing_T = np.zeros(len(sequence_T), np.int32)
    token_ids_T = nothing_T if tokens_ST is None else tokens_ST.ravel()
    gates_LTK = np.ones(ids_LTK.shape, np.float32)
    names = [str(g) for g in range(domain_S.max() + 1)]
    domain_T = domain_S[sequence_T]
    return RoutedText(
        token_ids_T, sequence_T, nothing_T, domain_T, ids_LTK, gates_LTK, n_experts, names
    )


def found_in(text):
    found = standing.of_text(text)
    assert found is not None
    return found


DOMAIN_S = np.arange(60) % 3


def test_domains_with_experts_of_their_own():
    """Each of three domains has two experts: they share nothing, shuffled they share all."""
    ids_ST = 2 * DOMAIN_S[:, None] + np.arange(50) % 2
    (found,) = found_in(routed(ids_ST, DOMAIN_S, 6))
    assert found.seen == (pytest.approx(0.5), 0.0, 1.0)
    assert found.blind.overlap > 0.2
    assert found.blind.specific < 0.1
    assert found.by_token == (pytest.approx(0.5), 1.0, 0.0)  # all tokens are of one id


def test_experts_of_tokens_are_experts_of_domains_with_these_tokens():
    """Tokens of ids 0 to 3 in the first domain, 4 to 7 in the second: an expert for each id."""
    domain_S = np.arange(40) % 2
    tokens_ST = 4 * domain_S[:, None] + np.arange(40) % 4
    (found,) = found_in(routed(tokens_ST, domain_S, 8, tokens_ST))
    assert found.seen == found.by_token == (pytest.approx(0.5), 0.0, 1.0)


def test_loads_alone_make_no_difference_between_domains():
    """Half of all tokens go to one of eight experts, whatever the domain: as the null model."""
    rng = np.random.default_rng(0)
    p_E = np.array([0.51, *np.full(7, 0.07)])
    ids_ST = rng.choice(8, size=(60, 200), p=p_E / p_E.sum())
    (found,) = found_in(routed(ids_ST, DOMAIN_S, 8))
    assert (
        found.seen.size
        == pytest.approx(found.blind.size, abs=0.05)
        == pytest.approx(1 / 8, abs=0.02)
    )
    assert found.seen.overlap > 0.8
    assert (found.seen.specific, found.blind.specific) == (0, 0)


def test_one_domain_says_nothing():
    assert standing.of_text(routed(np.zeros((60, 50), int), np.zeros(60, int), 2)) is None
