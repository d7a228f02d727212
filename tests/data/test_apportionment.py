"""Apportionment: as many sequences of each domain as its share says, wherever the stream is cut."""

import itertools
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsmoe_jax.data import apportionment
from dsmoe_jax.data.apportionment import Apportionment, Piece

N = 300


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    """One to three pieces of one to five domains; some shares are 0."""
    n_domains = draw(st.integers(1, 5))
    weights = st.lists(st.integers(0, 9), min_size=n_domains, max_size=n_domains).filter(any)
    lengths = draw(st.lists(st.fractions(1, 90, max_denominator=7), max_size=2))
    begin = -draw(st.fractions(0, 50, max_denominator=3))
    found = []
    for length in [*lengths, None]:
        first, last = ([Fraction(w, sum(ws)) for w in ws] for ws in (draw(weights), draw(weights)))
        found.append(Piece(begin, first, first if length is None else last))
        begin += length or 0
    return found


def _share(pieces: list[Piece], x: float, g: int) -> float:
    """The share of domain g at a place of time, by its definition."""
    i = max(i for i, piece in enumerate(pieces) if piece.begin <= x)
    piece = pieces[i]
    if i + 1 == len(pieces):
        return float(piece.shares[g])
    ends = [float(piece.begin), float(pieces[i + 1].begin)]
    return float(np.interp(x, ends, [float(piece.shares[g]), float(piece.last_shares[g])]))


def _target(pieces: list[Piece], n: int, g: int) -> float:
    """Its integral up to n, by the midpoints of the intervals between the borders."""
    borders = sorted({0.0, float(n), *(float(p.begin) for p in pieces if 0 < p.begin < n)})
    total = 0.0
    for low, high in itertools.pairwise(borders):  # a line: its middle is its mean
        total += (high - low) * _share(pieces, (low + high) / 2, g)
    return total


@hypothesis.given(pieces())
def test_counts_follow_the_shares(pieces: list[Piece]):
    stream = Apportionment(pieces)
    domain_N, rank_N = stream.domains_and_ranks(0, N)
    n_domains = len(pieces[0].shares)
    one_hot_NG = domain_N[:, None] == np.arange(n_domains)
    count_NG = np.cumsum(one_hot_NG, axis=0)
    # Each domain's sequences come one after the other.
    np.testing.assert_array_equal(rank_N, (count_NG - 1)[np.arange(N), domain_N])
    for n in (1, 2, 10, 77, N):
        np.testing.assert_array_equal(stream.counts(n), count_NG[n - 1])
        for g in range(n_domains):
            largest = max(float(max(p.shares[g], p.last_shares[g])) for p in pieces)
            error = abs(count_NG[n - 1, g] - _target(pieces, n, g))
            assert error < 0.5 + largest * (n_domains / 2 + 1) + 1e-6


@hypothesis.given(pieces(), st.integers(0, 10**6), st.integers(1, 40))
def test_any_part_of_the_stream_is_found_by_itself(pieces: list[Piece], first: int, count: int):
    stream = Apportionment(pieces)
    for start in (first % 200, first):
        domains, ranks = stream.domains_and_ranks(start, count)
        assert len(domains) == count
        before = stream.counts(start)
        assert before.sum() == start
        for i in range(count):  # one by one, from the counts before
            assert ranks[i] == before[domains[i]]
            before[domains[i]] += 1
        np.testing.assert_array_equal(before, stream.counts(start + count))


@hypothesis.given(pieces(), st.integers(0, 10**12))
def test_numbers_of_64_bits_are_exact(pieces: list[Piece], first: int):
    quick = Apportionment(pieces).domains_and_ranks(first, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apportionment, "_LARGEST", 0)  # Python's own numbers
        exact = Apportionment(pieces).domains_and_ranks(first, 20)
    for one, other in zip(quick, exact, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((1, 0), "a" * 8),
        ((Fraction(1, 2), Fraction(1, 2)), "abababab"),
        ((Fraction(3, 4), Fraction(1, 4)), "aabaaaba"),
    ],
)
def test_constant_shares_by_hand(shares: tuple[Fraction, Fraction], expected: str):
    shares = tuple(map(Fraction, shares))
    domain_N, _ = Apportionment([Piece(Fraction(0), shares, shares)]).domains_and_ranks(0, 8)
    assert "".join("ab"[domain] for domain in domain_N) == expected
