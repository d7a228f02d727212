"""Weights of the domains of a corpus over a run (`data.mixture`).

A weight is a number, or a schedule: pairs (share of the steps, weight).  The share of a domain is
its weight over the sum of all weights, and a domain that is not named has none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from dsmoe_jax.config.checks import number, require

_KEY = "data.mixture"
_FORM = (
    "must be a weight >= 0, or pairs (share of the steps, weight >= 0) with growing shares in 0..1"
)


class Segment(NamedTuple):
    """A part of a run in which the shares of the domains change along straight lines.

    Attributes:
      begin, end: shares of the steps.
      shares: of each domain where it begins; they sum to 1.
      last_shares: where it ends.
    """

    begin: Fraction
    end: Fraction
    shares: dict[str, Fraction]
    last_shares: dict[str, Fraction]


def check(mixture: Mapping[str, Any]) -> None:
    """Refuses weights that are no mixture.

    Raises:
      ValueError: naming the domain, or the share of the steps at which all weights are 0.
    """
    require(bool(mixture), _KEY, dict(mixture), "must name a domain, data.mixture.DOMAIN=WEIGHT")
    for domain, weight in mixture.items():
        key = f"{_KEY}.{domain}"
        pairs = ((0, weight),) if type(weight) in (int, float) else weight
        require(_is_schedule(pairs), key, weight, _FORM)
        for value in itertools.chain.from_iterable(pairs):
            number(key, value)
    segments(mixture)


def segments(mixture: Mapping[str, Any]) -> list[Segment]:
    """The parts of a run between the shares of the steps that any domain's schedule names.

    Shares are exact: a weight is the decimal number that was written, 0.1 is 1/10.

    Raises:
      ValueError: if all weights are 0 somewhere.
    """
    schedules = {domain: _schedule(weight) for domain, weight in mixture.items()}
    named = {at for schedule in schedules.values() for at, _ in schedule}
    borders = sorted({Fraction(0), *named, Fraction(1)})
    found = []
    for begin, end in itertools.pairwise(borders):
        weights = {domain: _after(schedule, begin) for domain, schedule in schedules.items()}
        last = {domain: _before(schedule, end) for domain, schedule in schedules.items()}
        shares = _normalised(mixture, weights, begin)
        found.append(Segment(begin, end, shares, _normalised(mixture, last, end)))
    # A schedule may jump at the last step: what a run that is trained for longer goes on with.
    weights = {domain: schedule[-1][1] for domain, schedule in schedules.items()}
    shares = _normalised(mixture, weights, Fraction(1))
    return [*found, Segment(Fraction(1), Fraction(1), shares, shares)]


_Schedule = list[tuple[Fraction, Fraction]]


def _schedule(weight: Any) -> _Schedule:
    pairs = ((0, weight),) if type(weight) in (int, float) else weight
    return [(Fraction(repr(at)), Fraction(repr(value))) for at, value in pairs]


def _is_schedule(pairs: Any) -> bool:
    """Whether these are pairs of growing shares in 0..1 and finite weights >= 0."""
    if not isinstance(pairs, tuple) or not pairs:
        return False
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            return False
        if not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in pair):
            return False
    ats = [at for at, _ in pairs]
    return ats == sorted(ats) and ats[-1] <= 1


def _after(schedule: _Schedule, at: Fraction) -> Fraction:
    """The weight from `at` on: of two pairs with the same share the second one counts."""
    begun = [i for i, (start, _) in enumerate(schedule) if start <= at]
    if not begun:
        return schedule[0][1]
    return _on_line(schedule, begun[-1], at)


def _before(schedule: _Schedule, at: Fraction) -> Fraction:
    """The weight just before `at`: of two pairs with the same share the first one counts."""
    begun = [i for i, (start, _) in enumerate(schedule) if start < at]
    if not begun:
        return schedule[0][1]
    return _on_line(schedule, begun[-1], at)


def _on_line(schedule: _Schedule, i: int, at: Fraction) -> Fraction:
    """The weight at a place behind pair `i`, on the straight line to the next pair."""
    start, weight = schedule[i]
    if i + 1 == len(schedule):
        return weight
    end, next_weight = schedule[i + 1]
    return weight + (next_weight - weight) * (at - start) / (end - start)


def _normalised(
    mixture: Mapping[str, Any], weights: dict[str, Fraction], at: Fraction
) -> dict[str, Fraction]:
    total = sum(weights.values(), Fraction(0))
    where = f"the weights sum to 0 at {float(at):g} of the steps, their sum must be > 0"
    require(total > 0, _KEY, dict(mixture), where)
    return {domain: weight / total for domain, weight in weights.items()}
