"""Formats of the numbers in a report; a missing number is NONE."""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe_jax.study import spread
from dsmoe_jax.study.measures import Measure

NONE = "–"


def fixed(value: float | None, digits: int | None) -> str:
    """A number with `digits` decimals; for None, three digits and a unit."""
    if value is None or digits is None:
        return short(value)
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # 0, not -0


def signed(value: float | None, digits: int | None = 3) -> str:
    """A difference with its sign."""
    if value is None:
        return NONE
    sign = "−" if value < 0 else "+"
    return sign + fixed(abs(value), digits)


def p_value(value: float | None) -> str:
    """A p with three decimals, or "< 0.001"."""
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def short(value: float | None) -> str:
    """Three digits and a unit: 5.66M, 2.04G."""
    if value is None:
        return NONE
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:g}"


def mean_of(values: Sequence[float], measure: Measure) -> str:
    """Mean over seeds, with ± the standard deviation where there are two or more."""
    mean, deviation = spread.mean_and_spread(values)
    tail = f" ± {fixed(deviation, measure.digits)}" if deviation is not None else ""
    return fixed(mean, measure.digits) + (tail if measure.spread else "")
