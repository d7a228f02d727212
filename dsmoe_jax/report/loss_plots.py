"""Pictures of losses: at the end of training, over training, and by domain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dsmoe_jax.report.names import short
from dsmoe_jax.report.style import axes, colour, label_ends, marker, smooth, token_axis
from dsmoe_jax.study.experiment import AnyArm
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison

LETTERS = 60  # of a line of a legend
MARKER = 4  # and the room around it, in letters


def final(comparison: Comparison) -> Figure | None:
    """The experiment's main measure at the end of training."""
    return dots(comparison, comparison.experiment.main_measure)


def dots(comparison: Comparison, measure: str) -> Figure | None:
    """A dot for the measure of each run, a stroke for the mean of each arm."""
    by_seed = comparison.by_seed(measure)
    arms = [arm for arm in comparison.arms if arm.label in by_seed]
    if not arms:
        return None
    figure, ax = axes(height=0.75 + 0.34 * len(arms), left=0.26, right=0.97)
    for y, arm in enumerate(arms):
        values = list(by_seed[arm.label].values())
        style: dict[str, Any] = {"color": colour(comparison, arm), "zorder": 3}
        ax.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], lw=2.2, **style)
        ax.plot(values, [y] * len(values), marker(comparison, arm), ms=5, alpha=0.75, **style)
    ax.set_yticks(range(len(arms)), [short(arm.label) for arm in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.08)
    label = MEASURES[measure].label
    better = MEASURES[measure].better
    ax.set_xlabel(f"{label} ({better})" if better else label)
    return figure


def learning_curves(comparison: Comparison) -> Figure | None:
    """Smoothed training loss with validation points, cut above so that differences show."""
    curves = {arm: _mean_curve(comparison, arm) for arm in comparison.arms}
    curves = {arm: curve for arm, curve in curves.items() if curve is not None}
    if not curves:
        return None
    figure, ax = axes(right=0.75)
    ends = {}
    points = []
    for arm, (tokens, loss) in curves.items():
        ax.plot(tokens, loss, lw=1.1, color=colour(comparison, arm))
        for history in comparison.histories_of(arm).values():
            ax.plot(
                history.validation_tokens,
                history.validation_loss,
                marker(comparison, arm),
                ms=3.6,
                mew=0,
                alpha=0.85,
                color=colour(comparison, arm),
            )
            points.append(history.validation_loss)
        ends[arm] = loss[-1]
    every = np.concatenate([loss for _, loss in curves.values()] + points)
    late = np.concatenate([loss[len(loss) // 4 :] for _, loss in curves.values()])
    margin = 0.06 * (late.max() - every.min()) or 0.01
    ax.set_ylim(every.min() - margin, late.max() + margin)
    token_axis(ax)
    ax.set_ylabel("loss, nats per token")
    label_ends(comparison, ax, ends)
    return figure


def loss_difference(comparison: Comparison) -> Figure | None:
    """Training loss minus the first arm's on the same batches, whose noise cancels.

    Thick lines are means over the seeds that both arms have, thin lines single seeds.
    """
    base, *others = comparison.arms
    pairs = {arm: _differences(comparison, base, arm) for arm in others}
    pairs = {arm: found for arm, found in pairs.items() if found}
    if not pairs:
        return None
    figure, ax = axes(right=0.75)
    longest = max((found[0][0] for found in pairs.values()), key=len)
    ax.plot(longest[[0, -1]], [0, 0], color=colour(comparison, base), lw=1.1)
    ends = {base: 0.0}
    late = [np.zeros(1)]
    for arm, found in pairs.items():
        arm_colour = colour(comparison, arm)
        n = min(len(tokens) for tokens, _ in found)
        mean = np.mean([difference[:n] for _, difference in found], axis=0)
        if len(found) > 1:
            for tokens, difference in found:
                ax.plot(tokens, difference, lw=0.5, alpha=0.6, color=arm_colour)
        ax.plot(found[0][0][:n], mean, color=arm_colour)
        ends[arm] = mean[-1]
        late.append(mean[len(mean) // 10 :])
    low = min(map(np.min, late))
    high = max(map(np.max, late))
    margin = 0.12 * (high - low) or 0.01
    ax.set_ylim(low - margin, high + margin)
    token_axis(ax)
    ax.set_ylabel(f"training loss minus {short(base.label)}'s")
    label_ends(comparison, ax, ends)
    return figure


def domains(comparison: Comparison) -> Figure | None:
    """Bits per byte of every domain minus the first arm's, mean over seeds."""
    base, *others = comparison.arms
    means = {arm: _domain_means(comparison, arm) for arm in comparison.arms}
    names = sorted(means[base], key=lambda name: means[base][name])
    others = [arm for arm in others if means[arm]]
    if not names or not others:
        return None
    labels = [short(arm.label) for arm in others]
    columns = min(4, max(1, LETTERS // (max(map(len, labels)) + MARKER)))
    lines = math.ceil(len(labels) / columns)
    height = 0.74 + 0.26 * lines + 0.24 * len(names)
    figure, ax = axes(height=height, left=0.26, right=0.97, top_lines=lines)
    ax.axvline(0, color=colour(comparison, base), lw=1.1)
    handles: list[Line2D] = []
    for arm in others:
        x = [means[arm].get(name, np.nan) - means[base][name] for name in names]
        style: dict[str, Any] = {"color": colour(comparison, arm), "ms": 4.5, "mew": 0}
        y = range(len(names))
        handles += ax.plot(x, y, marker(comparison, arm), alpha=0.85, **style)
    ax.set_yticks(range(len(names)), [short(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(f"bits per byte minus {short(base.label)}'s (left is better)")
    figure.legend(
        handles, labels, loc="upper center", ncols=columns,
        frameon=False, handletextpad=0.1, columnspacing=1.2, borderpad=0,
    )  # fmt: skip
    return figure


def _mean_curve(comparison: Comparison, arm: AnyArm) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and smoothed training loss of an arm, mean over its seeds up to the shortest run."""
    histories = [h for h in comparison.histories_of(arm).values() if len(h.loss)]
    if not histories:
        return None
    n = min(len(h.loss) for h in histories)
    return histories[0].tokens[:n], smooth(np.mean([h.loss[:n] for h in histories], axis=0))


def _differences(
    comparison: Comparison, base: AnyArm, arm: AnyArm
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and smoothed difference to the base of each seed that both arms have."""
    bases = comparison.histories_of(base)
    found = []
    for seed, history in comparison.histories_of(arm).items():
        if seed not in bases:
            continue
        n = min(len(history.loss), len(bases[seed].loss))
        if n:
            difference = history.loss[:n] - bases[seed].loss[:n]
            found.append((history.tokens[:n], smooth(difference)))
    return found


def _domain_means(comparison: Comparison, arm: AnyArm) -> dict[str, float]:
    rows = comparison.finished(arm)
    names = set.intersection(*(set(row.domains) for row in rows)) if rows else set()
    return {name: float(np.mean([row.domains[name] for row in rows])) for name in names}
