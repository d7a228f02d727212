"""Analyses in compute: the law of the loss, and differences as more training of a baseline."""

from __future__ import annotations

from pathlib import Path

from dsmoe_jax.config.files import REPOSITORY
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
from dsmoe_jax.report.law_plots import Curve, arms_over, curves, places
from dsmoe_jax.report.names import literal
from dsmoe_jax.report.numbers import fixed
from dsmoe_jax.study import baselines, effective, laws, spread
from dsmoe_jax.study.baselines import BaselineRuns, NoBaseline
from dsmoe_jax.study.claims import LOSS
from dsmoe_jax.study.effective import ArmCompute, Counted
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison

LAW, EFFECTIVE = "Loss over compute", "Differences as compute"
COMPUTE_AXIS = "training FLOPs"


def law(comparison: Comparison, results: Path) -> list[Block]:
    """A law of compute for each line of the experiment."""
    blocks: list[Block] = [
        Heading(LAW),
        Text(
            "C is the FLOPs of the whole training, as the paper counts them, L the loss on held-out"
            " text."
        ),
    ]
    drawn = []
    for line in dict.fromkeys(arm.line for arm in comparison.arms if arm.x is not None):
        found = sweep(comparison, line)
        if found is None:
            blocks += missing(f"{line}: no seed is finished in all arms yet.")
            continue
        C_P = [_compute(comparison, found, i) for i in range(len(found.arms))]
        try:
            estimate = laws.compute_law(C_P, found.losses_SP)
        except ValueError as error:
            blocks += missing(f"{line}: not fitted: {error}.")
            continue
        blocks += [Text(f"**{literal(line)}**"), constants_table(estimate), *remarks(estimate)]
        drawn.append(_curve(line, estimate, C_P, found.losses_SP))
    if drawn:
        figure = curves(drawn, COMPUTE_AXIS, MEASURES[LOSS].label)
        caption = "Large dots are means over seeds, small ones single runs; bands hold 95 %."
        blocks.append(Pictures([Picture("compute_law", "The law of compute", caption, figure)]))
    return blocks


def _compute(comparison: Comparison, found: Sweep, i: int) -> float:
    arm = found.arms[i]
    config = arm.run_config(comparison.scale, 0, comparison.overrides)
    compute = baselines.compute_of(comparison.finished(arm)[0], config)
    assert compute is not None, "the run is finished"
    return compute


def _curve(name: str, estimate: laws.Estimate, C_P, losses_SP, reach: float = 1.0) -> Curve:
    """The curve of a law of compute, drawn up to `reach` times its largest model."""
    low, high = estimate.fit.ranges["C"]
    x_X = places(low, max(high, reach))
    return Curve(name, C_P, losses_SP, x_X, estimate.fit.predict(C=x_X), estimate.band(C=x_X))


def effective_compute(comparison: Comparison, results: Path) -> list[Block]:
    """The compute with which the baseline reaches the loss of each arm, over the arm's own."""
    baseline = comparison.experiment.baseline
    assert baseline is not None, "an experiment with this analysis has one"
    try:
        counted = effective.count(comparison, results)
    except NoBaseline as error:
        return [Heading(EFFECTIVE), Text(str(error))]
    name = literal(baseline.line)
    reference = literal(baseline.reference)
    low, high = (c / counted.runs.reference for c in counted.law.fit.ranges["C"])
    head = ["", "loss", "own compute", f"{baseline.line} needs", "95 % interval", "over its own"]
    note = (
        f"Compute in units of the run of {reference}, trained as these arms are. {name} needs: the"
        f" compute at which the law of its own sizes reaches the arm's loss. Its sizes span"
        f" {number(low)} to {number(high)} of the unit; * is beyond them, and more than"
        f" {laws.FAR:g} times beyond them no number is given. The law is shifted so that"
        f" {reference} counts as 1. Intervals hold the spread over seeds, not the error of the form"
        f" of the law. Seeds, which all have: {', '.join(map(str, counted.seeds))}."
    )
    return [
        Heading(EFFECTIVE),
        Text(f"How much more training {name} would need for the same loss."),
        Table(head, [_row(arm, low, high) for arm in counted.arms]),
        Text(note + ("" if counted.law.resampled else f" {NO_INTERVAL}"), "note"),
        Text(
            f"The law of {name}, from `{shown(counted.runs)}`:"
            f" `{laws.FORMS[counted.law.fit.form].text}`.",
        ),
        constants_table(counted.law),
        *remarks(counted.law),
        _picture(comparison, counted),
    ]


def shown(runs: BaselineRuns) -> str:
    """The path of the results, within the repository if they come with it."""
    inside = runs.path.is_relative_to(REPOSITORY)
    return literal(str(runs.path.relative_to(REPOSITORY) if inside else runs.path))


def _row(arm: ArmCompute, low: float, high: float) -> list[str]:
    times = _times(arm.times, low, high)
    interval = None if arm.interval is None else [_times(end, low, high) for end in arm.interval]
    leverage = number(arm.times / arm.own) if arm.beyond <= laws.FAR else ends(None)
    return [
        arm.label,
        fixed(arm.loss, 3),
        f"×{number(arm.own)}",
        times,
        ends(None) if interval is None else f"{interval[0]} to {interval[1]}",
        leverage if leverage == ends(None) else f"×{leverage}",
    ]


def _times(times: float, low: float, high: float) -> str:
    """Effective compute, marked where it is beyond the baseline's sizes."""
    if times > laws.FAR * high:
        return f"above {number(laws.FAR * high)}"
    if times < low / laws.FAR:
        return f"below {number(low / laws.FAR)}"
    return f"×{number(times)}" + ("" if low <= times <= high else " *")


def _picture(comparison: Comparison, counted: Counted) -> Pictures:
    runs = counted.runs
    arms = {arm.label: arm for arm in comparison.arms}
    at = {arms[a.label]: (a.own * runs.reference, a.loss) for a in counted.arms}
    baseline = comparison.experiment.baseline
    assert baseline is not None, "its compute was counted"
    losses_SP = spread.table_of(runs.losses, runs.labels, counted.seeds)
    furthest = max(x for x, _ in at.values())
    curve = _curve(f"{baseline.line}, law", counted.law, runs.compute_P, losses_SP, furthest)
    figure = arms_over(comparison, curve, at, COMPUTE_AXIS, MEASURES[LOSS].label)
    caption = (
        f"Black: {literal(baseline.line)} at its sizes, its law and a band that holds 95 %. An arm"
        " left of the line needs less compute for its loss than the baseline does."
    )
    return Pictures([Picture("effective_compute", "The arms beside the law", caption, figure)])
