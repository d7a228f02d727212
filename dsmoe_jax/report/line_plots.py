"""A measure over a quantity that the arms vary: a rate, a width, how many experts are masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dsmoe_jax.report.style import ARM_COLOURS, INK, MARKERS, WIDTH, axes, label_ends
from dsmoe_jax.study.experiment import AnyArm
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison

LOG = "log"
ByLabel = Mapping[str, Mapping[int, float]]  # label -> seed -> value


def over_x(comparison: Comparison) -> Figure | None:
    """The main measure over `x`: a line of means over seeds, small dots for single runs.

    Arms with the same `line` are joined; an arm without `x` is a level line.
    """
    experiment = comparison.experiment
    values = comparison.by_seed(experiment.main_measure)
    found = [arm for arm in comparison.arms if arm.label in values]
    lines: dict[str, list[AnyArm]] = {}
    for arm in sorted(found, key=lambda arm: arm.x is None):  # level lines last
        lines.setdefault(arm.line if arm.x is not None else arm.label, []).append(arm)
    if all(arm.x is None for arm in found):
        return None
    figure, ax = axes(right=0.75)
    names = dict.fromkeys(arm.line if arm.x is not None else arm.label for arm in experiment.arms)
    _draw_lines(ax, comparison, lines, values, names)
    ax.set_xlabel(experiment.x_axis)
    ax.set_ylabel(MEASURES[experiment.main_measure].label)
    return figure


def panels_over_x(comparison: Comparison) -> Figure | None:
    """The lines of `Experiment.panels`, a panel below the other; the best of each line is ringed.

    None without panels.
    """
    experiment = comparison.experiment
    measure = MEASURES[experiment.main_measure]
    values = comparison.by_seed(experiment.main_measure)
    panels = _panels(comparison, values)
    if not panels:
        return None
    height = 0.5 + 2.3 * len(panels)
    figure = Figure(figsize=(WIDTH, height))
    column = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    figure.subplots_adjust(0.15, 0.46 / height, 0.75, 1 - 0.22 / height, hspace=0.14)
    drawn = [arm for lines in panels.values() for arms in lines.values() for arm in arms]
    every = [value for arm in drawn for value in values[arm.label].values()]
    margin = 0.06 * (max(every) - min(every)) or 0.01
    column[0].set_ylim(min(every) - margin, max(every) + margin)  # names are placed by it
    for (title, lines), ax in zip(panels.items(), column, strict=True):
        for arms in lines.values():
            _ring_best(ax, arms, values, highest=measure.lower_is_better is False)
        names = experiment.panels[title]
        _draw_lines(ax, comparison, lines, values, names, suffix=f", {title}")
        ax.set_title(title, loc="left", pad=3)
        ax.set_ylabel(measure.label)
    column[-1].set_xlabel(experiment.x_axis)
    return figure


def _panels(comparison: Comparison, values: ByLabel) -> dict[str, dict[str, list[AnyArm]]]:
    """The arms with a value by panel and line; no panel or line is empty."""
    found = [arm for arm in comparison.arms if arm.label in values]
    panels: dict[str, dict[str, list[AnyArm]]] = {}
    for title, names in comparison.experiment.panels.items():
        for name in names:
            arms = [arm for arm in found if arm.line == name]
            if arms:
                panels.setdefault(title, {})[name] = arms
    return panels


def _ring_best(ax: Axes, arms: list[AnyArm], values: ByLabel, *, highest: bool) -> None:
    means = {arm: _mean(values[arm.label]) for arm in arms if arm.x is not None}
    best = (max if highest else min)(means, key=lambda arm: means[arm])
    style: dict[str, Any] = {"s": 90, "facecolors": "none", "edgecolors": INK, "linewidths": 1.1}
    ax.scatter([float(best.x or 0.0)], [means[best]], zorder=4, **style)


def _draw_lines(
    ax: Axes,
    comparison: Comparison,
    lines: Mapping[str, list[AnyArm]],
    values: ByLabel,
    names: Iterable[str],
    suffix: str = "",
) -> None:
    """Draws lines with their names, less a suffix that the panel's title has, at the ends.

    A line's place in `names`, shown or not, gives its colour and marker.
    """
    experiment = comparison.experiment
    if experiment.x_scale == LOG:
        ax.set_xscale("log")
    styles = {name: (ARM_COLOURS[i % 7], MARKERS[i % 7]) for i, name in enumerate(names)}
    ends: dict[AnyArm, float] = {}
    ends_of: dict[AnyArm, str] = {}
    colours: dict[AnyArm, str] = {}
    for name, arms in lines.items():
        last = _draw(ax, arms, values, *styles[name])
        ends[last] = _mean(values[last.label])
        ends_of[last] = name.removesuffix(suffix)
        colours[last] = styles[name][0]
    drawn = [arm for arms in lines.values() for arm in arms]
    _ticks(ax, sorted({arm.x for arm in drawn if arm.x is not None}), experiment.x_scale)
    label_ends(comparison, ax, ends, ends_of, colours)


def _draw(ax: Axes, arms: list[AnyArm], values: ByLabel, colour: str, marker: str) -> AnyArm:
    """Draws one line; returns the arm at its end."""
    if arms[0].x is None:
        ax.axhline(_mean(values[arms[0].label]), color=colour, lw=1.1)
        return arms[0]
    arms = sorted(arms, key=lambda arm: arm.x or 0.0)
    by_seed = [list(values[arm.label].values()) for arm in arms]
    x = [float(arm.x or 0.0) for arm in arms]
    ax.plot(x, [np.mean(runs) for runs in by_seed], marker + "-", ms=4, color=colour)
    for at, runs in zip(x, by_seed, strict=True):
        if len(runs) > 1:
            ax.scatter([at] * len(runs), runs, s=6, alpha=0.5, linewidths=0, color=colour)
    return arms[-1]


def _mean(by_seed: Mapping[int, float]) -> float:
    return float(np.mean(list(by_seed.values())))


def _ticks(ax: Axes, values: list[float], scale: str) -> None:
    """On a logarithmic axis, a tick at each value of the arms."""
    if scale == LOG:
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(values, [f"{value:g}" for value in values])
