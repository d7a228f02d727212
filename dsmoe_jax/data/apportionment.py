"""Which domain each sequence of a stream is of, when the domains have shares that may change.

Webster's method (Sainte-Lague), for shares that may change: wherever the stream is cut, the number
of sequences of each domain is its share of them, about as near as whole numbers allow.

Let `target_G(x)` be the sum of the shares over the first x places of time.  Sequence i of a domain
(0, 1, ...) is due when its target reaches i + 1/2.  The stream is all sequences of all domains in
the order in which they are due, those of the same place of time in the order of the domains.  Since
`due_G(x) = floor(target_G(x) + 1/2)` is exact, sequence n is found without those before it:
`sum(due_G(x))` differs from x by half the number of domains at most.

The number of sequences of domain g among the first n differs from `target_g(n)` by less than
1/2 + (largest share of g) * (G/2 + 1).

Shapes: G domains, X places of time, N sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

_LARGEST = 2**62  # what numbers of 64 bits are used for; above it Python's own, which are slower


class Piece(NamedTuple):
    """A part of a stream in which shares change along straight lines.

    Attributes:
      begin: its first place of time, which need not be whole.
      shares: of each domain there, G fractions that sum to 1.
      last_shares: where the next piece begins; of the last piece they are its shares.
    """

    begin: Fraction
    shares: Sequence[Fraction]
    last_shares: Sequence[Fraction]


class Apportionment:
    """The domain of every sequence of an endless stream.

    Args:
      pieces: of the stream, the first one beginning at 0 or before.
    """

    def __init__(self, pieces: Sequence[Piece]):
        # Those that end before the stream begins have no part in it.
        begun = max(i for i, piece in enumerate(pieces) if piece.begin <= 0)
        pieces = pieces[begun:]
        self._n_domains = len(pieces[0].shares)
        self._begins = [piece.begin for piece in pieces]
        self._polynomials: list[list[_Polynomial]] = []
        targets = [Fraction(0)] * self._n_domains
        for i, piece in enumerate(pieces):
            end = pieces[i + 1].begin if i + 1 < len(pieces) else None
            start = max(piece.begin, Fraction(0))
            polynomials = [
                _polynomial(piece.begin, end, first, last, start, target)
                for first, last, target in zip(
                    piece.shares, piece.last_shares, targets, strict=True
                )
            ]
            self._polynomials.append(polynomials)
            if end is not None:
                targets = [polynomial(end) for polynomial in polynomials]

    def domains_and_ranks(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences `first` to `first + count - 1` of the stream.

        Returns:
          The domain of each, int64 (N,), and how many of that domain come before it, int64 (N,).
        """
        start = max(0, first - self._n_domains)
        due_XG = self._due(start, first + count + self._n_domains)
        # A share is at most 1: at one place of time no more than one sequence of a domain is due.
        x_N, domain_N = np.nonzero(np.diff(due_XG, axis=0))
        skipped = first - int(due_XG[0].sum())
        chosen = slice(skipped, skipped + count)
        return domain_N[chosen], due_XG[x_N[chosen], domain_N[chosen]]

    def counts(self, n: int) -> np.ndarray:
        """The sequences of each domain among the first `n`, int64 (G,)."""
        start = max(0, n - self._n_domains)
        due_XG = self._due(start, n + self._n_domains)
        _, domain_N = np.nonzero(np.diff(due_XG, axis=0))
        before = n - int(due_XG[0].sum())
        return due_XG[0] + np.bincount(domain_N[:before], minlength=self._n_domains)

    def _due(self, start: int, stop: int) -> np.ndarray:
        """Sequences that are due by each place of time from `start` to `stop`, int64 (X, G)."""
        parts = []
        borders = [math.ceil(begin) for begin in self._begins[1:]]
        for i, (low, high) in enumerate(itertools.pairwise([0, *borders, stop + 1])):
            low, high = max(low, start), min(high, stop + 1)
            if low < high:
                parts.append(np.stack([p.rounded(low, high) for p in self._polynomials[i]], axis=1))
        return np.concatenate(parts)


class _Polynomial(NamedTuple):
    """(a x^2 + b x + c) / d in whole numbers."""

    a: int
    b: int
    c: int
    d: int

    def __call__(self, x: Fraction) -> Fraction:
        return (self.a * x * x + self.b * x + self.c) / Fraction(self.d)

    def rounded(self, start: int, stop: int) -> np.ndarray:
        """floor(value + 1/2) at start, ..., stop - 1: exact, int64."""
        a, b, c, d = 2 * self.a, 2 * self.b, 2 * self.c + self.d, 2 * self.d
        largest = abs(a) * stop * stop + abs(b) * stop + abs(c)
        fits = max(largest, d) < _LARGEST
        x_X = np.arange(start, stop).astype(np.int64 if fits else object)
        return ((a * x_X * x_X + b * x_X + c) // d).astype(np.int64)


def _polynomial(
    begin: Fraction,
    end: Fraction | None,
    share: Fraction,
    last_share: Fraction,
    start: Fraction,
    target: Fraction,
) -> _Polynomial:
    """The integral of a share that is `share` at `begin` and `last_share` at `end`.

    It is `target` at `start`.
    """
    slope = Fraction(0) if end is None else (last_share - share) / (end - begin)
    a = slope / 2
    b = share - slope * begin
    c = target - a * start * start - b * start
    d = math.lcm(a.denominator, b.denominator, c.denominator)
    return _Polynomial(int(a * d), int(b * d), int(c * d), d)
