"""Analyses of a sweep over granularity: the law, the U-shape, and how equal the times were.

Shapes: P points (granularities), S seeds, R resamples.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsmoe_jax.report.blocks import Block, Heading, Picture, Pictures, Table, Text
from dsmoe_jax.report.law_blocks import (
    NO_INTERVAL,
    Sweep,
    constants_table,
    ends,
    missing,
    number,
    remarks,
    sweep,
)
from dsmoe_jax.report.law_plots import Curve, curves, places
from dsmoe_jax.report.numbers import NONE, mean_of
from dsmoe_jax.study import effective, laws
from dsmoe_jax.study.baselines import NoBaseline
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.resampling import interval, resampled_means
from dsmoe_jax.study.results import Comparison
from dsmoe_jax.study.u_shape import GRANULARITY_PER_SPLIT, UShape, fit_u_shape

LAW, U_SHAPE, TIME = "The granularity law", "A U-shape in granularity", "How equal the times were"
OPTIMUM = (8.0, 12.0)  # of 2507.17702, in its G
NEAR = 0.05  # relative difference of times that counts as equal


def law(comparison: Comparison, results: Path) -> list[Block]:
    """The law of 2402.07871, in the form that the sweep can tell."""
    found = sweep(comparison)
    if found is None:
        return [Heading(LAW), *missing("No seed is finished in all arms yet.")]
    try:
        estimate = laws.granularity_law(
            found.x_P,
            _measured(comparison, found, "total"),
            _measured(comparison, found, "tokens"),
            found.losses_SP,
        )
    except ValueError as error:
        return [Heading(LAW), *missing(f"Not fitted: {error}.")]
    return [
        Heading(LAW),
        Text(
            "G is m, how many times an expert is smaller than a standard FFN; L is the loss on"
            " held-out text (arXiv 2402.07871)."
        ),
        constants_table(estimate),
        *remarks(estimate),
        *_law_picture(comparison, found, estimate),
    ]


def _measured(comparison: Comparison, found: Sweep, measure: str) -> np.ndarray:
    """A measure that is the same for all seeds, (P,)."""
    values = [comparison.finished(arm)[0][measure] for arm in found.arms]
    return np.array(values, np.float64)


def _law_picture(comparison: Comparison, found: Sweep, estimate: laws.Estimate) -> list[Block]:
    if set(laws.FORMS[estimate.fit.form].variables) != {"G"}:
        return []  # several sizes: there is no one curve
    x_X = places(found.x_P.min(), found.x_P.max())
    curve = Curve(
        laws.FORMS[estimate.fit.form].text,
        found.x_P,
        found.losses_SP,
        x_X,
        estimate.fit.predict(G=x_X),
        estimate.band(G=x_X),
    )
    figure = curves([curve], comparison.experiment.x_axis, MEASURES["validation_loss"].label)
    caption = "Large dots are means over seeds, small ones single runs; the band holds 95 %."
    return [Pictures([Picture("granularity_law", "The law over the sweep", caption, figure)])]


def u_shape(comparison: Comparison, results: Path) -> list[Block]:
    """The log-quadratic of 2507.17702: of the leverage if there is a baseline, else of the loss."""
    found = sweep(comparison)
    if found is None:
        return [Heading(U_SHAPE), *missing("No seed is finished in all arms yet.")]
    loss_P = found.losses_SP.mean(axis=0)
    means_RP = resampled_means(found.losses_SP)
    blocks: list[Block] = [Heading(U_SHAPE)]
    try:
        shape = fit_u_shape(found.x_P, -loss_P)
    except ValueError as error:
        return [*blocks, *missing(f"Not fitted: {error}.")]
    shapes = [] if means_RP is None else [fit_u_shape(found.x_P, -mean_P) for mean_P in means_RP]
    of_loss = ("the loss", shape, shapes)
    rows = [_optimum_row(*of_loss)]
    note = ""
    if comparison.experiment.baseline is not None:
        try:
            rows.append(_optimum_row(*_of_leverage(comparison, results, found)))
        except (NoBaseline, ValueError) as error:
            note = f" The leverage is not fitted: {error}"
    low, high = (g / GRANULARITY_PER_SPLIT for g in OPTIMUM)
    head = ["a quadratic in log m through", "optimum at m", "95 % interval of the best m", "says"]
    return [
        *blocks,
        Table(head, rows, prose=True),
        Text(
            "arXiv 2507.17702 counts granularity as G = 2 hidden size / expert width, which is"
            f" 3 m / 4 here, and has its optimum at G of 8 to 12, that is m of {low:.0f} to"
            f" {high:.0f}. The best m is that of the highest point of the curve within the sweep;"
            f" its interval cannot leave the sweep.{'' if shapes else ' ' + NO_INTERVAL}{note}",
            "note",
        ),
        _u_picture(comparison, found, *of_loss[1:]),
    ]


def _of_leverage(
    comparison: Comparison, results: Path, found: Sweep
) -> tuple[str, UShape, list[UShape]]:
    """The curve through the logarithm of the leverage over the baseline.

    Raises:
      NoBaseline: if there is none, or its law does not reach as far as the losses.
    """
    counted = effective.count(comparison, results)
    by_label = {arm.label: arm for arm in counted.arms}
    arms = [by_label[arm.label] for arm in found.arms]
    if max(arm.beyond for arm in arms) > laws.FAR:
        raise NoBaseline("The losses are too far beyond the baseline's sizes.")
    own_P = np.array([arm.own for arm in arms])
    times_P = np.array([arm.times for arm in arms])
    shape = fit_u_shape(found.x_P, np.log(times_P / own_P))
    shapes = [
        fit_u_shape(found.x_P, np.log(np.array(times_P) / own_P))
        for times_P in zip(*(arm.times_R for arm in arms), strict=True)
        if np.isfinite(times_P).all()
    ]
    baseline = comparison.experiment.baseline
    assert baseline is not None, "its compute was counted"
    return f"the logarithm of the leverage over {baseline.line}", shape, shapes


def _optimum_row(name: str, shape: UShape, shapes: list[UShape]) -> list[str]:
    best = interval(np.array([each.best for each in shapes])) if shapes else None
    if shape.optimum is None:
        said = f"no optimum inside {shape.low:g} to {shape.high:g}: best at m = {shape.best:g}"
        return [name, NONE, ends(best), said]
    return [name, number(shape.optimum), ends(best), "an optimum inside the sweep"]


def _u_picture(
    comparison: Comparison, found: Sweep, shape: UShape, shapes: list[UShape]
) -> Pictures:
    x_X = places(found.x_P.min(), found.x_P.max())
    band = None
    if shapes:
        losses_RX = -np.array([each.predict(x_X) for each in shapes])
        low_X, high_X = np.quantile(losses_RX, (0.025, 0.975), axis=0)
        band = low_X, high_X
    curve = Curve("quadratic in log m", found.x_P, found.losses_SP, x_X, -shape.predict(x_X), band)
    figure = curves([curve], comparison.experiment.x_axis, MEASURES["validation_loss"].label)
    caption = "Large dots are means over seeds, small ones single runs; the band holds 95 %."
    return Pictures([Picture("granularity_u_shape", "The U-shape", caption, figure)])


def equal_time(comparison: Comparison, results: Path) -> list[Block]:
    """Seconds in training steps of all arms, beside the first one's, seed by seed."""
    seconds = comparison.by_seed("seconds")
    first = comparison.arms[0].label
    if first not in seconds:
        return [Heading(TIME), *missing(f"{first} is not finished yet.")]
    rows = []
    ratios = {}
    for label, by_seed in seconds.items():
        shared = [seed for seed in by_seed if seed in seconds[first]]
        if shared:
            ratios[label] = float(np.median([by_seed[s] / seconds[first][s] for s in shared]))
        cells = [mean_of(list(by_seed.values()), MEASURES["seconds"])]
        rows.append([label, *cells, number(ratios.get(label))])
    largest = max(abs(ratio - 1) for ratio in ratios.values())
    verdict = (
        f"The times differ from that of {first} by at most {100 * largest:.1f} %."
        if largest <= NEAR
        else f"**The times are not equal**: they differ from that of {first} by up to"
        f" {100 * largest:.0f} %. The steps were planned with times of another machine, scale or"
        " hour; measure them here and train again."
    )
    return [
        Heading(TIME),
        Text(verdict),
        Table(["", "seconds in training steps", f"over {first}"], rows),
    ]
