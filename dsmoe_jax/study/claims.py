"""Claims: statements about a measure of arms, which runs can confirm or refute.

Every claim has the form `constant + sum over arms of weight * mean of the measure > 0`; the
functions below make the usual ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

LOSS = "validation_loss"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement that holds where `constant + sum(weight * mean of the measure)` is above 0.

    Attributes:
      text: as shown, "GShard below Switch".
      weights: of the arms, by label.
      constant: in the unit of the measure.
      measure: a name in `measures.MEASURES`.
      source: paper and place, "V1 figure 3".
      paper: the sum that the source's own numbers give; None where it prints none.
    """

    text: str
    weights: Mapping[str, float]
    constant: float = 0.0
    measure: str = LOSS
    source: str = ""
    paper: float | None = None

    @property
    def is_ordering(self) -> bool:
        """Whether the claim is about the sign of the difference of two arms."""
        return self.constant == 0 and sorted(self.weights.values()) == [-1, 1]


def below(
    lower: str,
    higher: str,
    *,
    measure: str = LOSS,
    source: str = "",
    paper: float | None = None,
) -> Claim:
    """An ordering: the measure of one arm is below that of another."""
    weights = {higher: 1.0, lower: -1.0}
    return Claim(f"{lower} below {higher}", weights, 0.0, measure, source, paper)


def decreasing(*labels: str, measure: str = LOSS, source: str = "") -> tuple[Claim, ...]:
    """All orderings of arms that are given from the highest value to the lowest."""
    return tuple(
        below(lower, higher, measure=measure, source=source)
        for i, higher in enumerate(labels)
        for lower in labels[i + 1 :]
    )


def larger_change(
    text: str,
    larger: tuple[str, str],
    smaller: tuple[str, str],
    *,
    measure: str = LOSS,
    source: str = "",
    paper: float | None = None,
) -> Claim:
    """The sign of a difference of differences.

    From the first arm of `larger` to the second the measure grows by more than from the first arm
    of `smaller` to the second.
    """
    weights: dict[str, float] = {}
    for sign, (before, after) in ((1.0, larger), (-1.0, smaller)):
        weights[after] = weights.get(after, 0.0) + sign
        weights[before] = weights.get(before, 0.0) - sign
    return Claim(text, weights, 0.0, measure, source, paper)


def ratio_below(
    part: str,
    whole: str,
    ratio: float,
    *,
    measure: str = LOSS,
    source: str = "",
    paper: float | None = None,
) -> Claim:
    """A ratio: the measure of one arm is below `ratio` times that of another."""
    text = f"{part} below {ratio:g} × {whole}"
    return Claim(text, {whole: ratio, part: -1.0}, 0.0, measure, source, paper)


def keeps(
    arm: str,
    gain: tuple[str, str],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    measure: str = LOSS,
    source: str = "",
) -> Claim:
    """A share: of what the second arm of `gain` is below the first one, `arm` keeps so much.

    (worse - arm) / (worse - better) >= share, where the gain is above 0, is the linear inequality
    (1 - share) worse + share better - arm >= 0.

    Raises:
      ValueError: unless one of the two is given.
    """
    if (at_least is None) == (at_most is None):
        raise ValueError(f"at_least={at_least}, at_most={at_most}: give one of the two")
    worse, better = gain
    if at_least is not None:
        text = f"{arm} keeps at least {100 * at_least:g} % of the gain"
        weights = {worse: 1 - at_least, better: at_least, arm: -1.0}
    else:
        assert at_most is not None
        text = f"{arm} keeps at most {100 * at_most:g} % of the gain"
        weights = {worse: at_most - 1, better: -at_most, arm: 1.0}
    return Claim(text, weights, 0.0, measure, source)


def bounded(
    label: str,
    *,
    above: float | None = None,
    below: float | None = None,
    measure: str = LOSS,
    source: str = "",
    paper: float | None = None,
) -> Claim:
    """A bound: the measure of one arm is above, or below, a number.

    Raises:
      ValueError: unless one of the two is given.
    """
    if (above is None) == (below is None):
        raise ValueError(f"above={above}, below={below}: give one of the two")
    if below is not None:
        return Claim(f"{label} below {below:g}", {label: -1.0}, below, measure, source, paper)
    assert above is not None
    return Claim(f"{label} above {above:g}", {label: 1.0}, -above, measure, source, paper)
