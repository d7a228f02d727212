"""Parts that the analyses share: sweeps, tables of constants, intervals in words."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dsmoe_jax.report.blocks import Block, Table, Text
from dsmoe_jax.report.names import literal
from dsmoe_jax.report.numbers import NONE
from dsmoe_jax.study import spread
from dsmoe_jax.study.claims import LOSS
from dsmoe_jax.study.experiment import AnyArm
from dsmoe_jax.study.laws import FORMS, Estimate
from dsmoe_jax.study.resampling import Interval
from dsmoe_jax.study.results import Comparison

NO_INTERVAL = "One seed: there is no interval; run with --seeds=2 or more to have one."


class Sweep(NamedTuple):
    """Finished arms along `x`, with the seeds that they share.

    Attributes:
      arms: P of them, by `x`.
      x_P: their `x`.
      losses_SP: validation losses, a row a seed.
    """

    arms: tuple[AnyArm, ...]
    x_P: np.ndarray
    losses_SP: np.ndarray


def sweep(comparison: Comparison, line: str | None = None) -> Sweep | None:
    """The finished arms with `x`, of one line or all; None if no seed is finished in them."""
    losses = comparison.by_seed(LOSS)
    chosen = [
        (arm.x, arm)
        for arm in comparison.arms
        if arm.x is not None and arm.label in losses and line in (None, arm.line)
    ]
    chosen.sort(key=lambda pair: pair[0])
    labels = [arm.label for _, arm in chosen]
    seeds = spread.common_seeds({label: losses[label] for label in labels})
    if not seeds:
        return None
    x_P = np.array([x for x, _ in chosen])
    return Sweep(tuple(arm for _, arm in chosen), x_P, spread.table_of(losses, labels, seeds))


def constants_table(estimate: Estimate) -> Table:
    """One row a constant of a law, with its interval."""
    form = FORMS[estimate.fit.form]
    names = [*(term.coefficient for term in form.terms), *form.exponents]
    rows = [
        [name, number(estimate.fit.constants[name]), ends(estimate.interval(name))]
        for name in names
    ]
    return Table([form.text, "value", "95 % interval"], rows)


def remarks(estimate: Estimate) -> list[Block]:
    """Facts that must be known before a law is believed."""
    said = [estimate.reason, *estimate.fit.remarks()]
    if not estimate.resampled:
        said.append(NO_INTERVAL)
    error = f"The law leaves {estimate.fit.error:.2g} nats per token over (root mean square)."
    return [Text(" ".join([*filter(None, said), error]), "note")]


def missing(text: str) -> list[Block]:
    """A paragraph in place of an analysis that cannot be made."""
    return [Text(literal(text))]


def number(value: float | None) -> str:
    """Three digits of a number of any size."""
    if value is None:
        return NONE
    return "∞" if math.isinf(value) else f"{value:.3g}"


def ends(interval: Interval | None) -> str:
    """An interval in words."""
    return NONE if interval is None else f"{number(interval.low)} to {number(interval.high)}"
