"""Pictures of losses: where the runs ended, how they got there, and by domain."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.report.style import axes, colour, label_ends, marker, smooth, token_axis
from dsmoe_jax.study.experiment import AnyArm
from dsmoe_jax.study.histories import History
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison


def final(comparison: Comparison) -> Figure | None:
    """The dots of the measure that the experiment goes by."""
    return dots(comparison, comparison.experiment.main_measure)


def dots(comparison: Comparison, measure: str) -> Figure | None:
    """Every run's measure as a dot, every arm's mean as a stroke."""
    by_seed = comparison.by_seed(measure)
    arms = [arm for arm in comparison.arms if arm.label in by_seed]
    if not arms:
        return None
    figure, ax = axes(height=0.75 + 0.34 * len(arms), left=0.26, right=0.97)
    for y, arm in enumerate(arms):
        values = list(by_seed[arm.label].values())
        style = {"color": colour(comparison, arm), "zorder": 3}
        ax.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], lw=2.2, **style)  # pyright: ignore
        ax.plot(values, [y] * len(values), marker(comparison, arm), ms=5, alpha=0.75, **style)  # pyright: ignore
    ax.set_yticks(range(len(arms)), [arm.label for arm in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.08)
    label, better = MEASURES[measure].label, MEASURES[measure].better
    ax.set_xlabel(f"{label} ({better})" if better else label)
    return figure


def learning_curves(comparison: Comparison) -> Figure | None:
    """Smoothed training loss with validation points, cut above so that differences show."""
    curves = {arm: _mean_curve(comparison, arm) for arm in comparison.arms}
    curves = {arm: curve for arm, curve in curves.items() if curve is not None}
    if not curves:
        return None
    figure, ax = axes(right=0.75)
    ends, points = {}, []
    for arm, (tokens, loss) in curves.items():
        style = {"color": colour(comparison, arm)}
        ax.plot(tokens, loss, lw=1.1, **style)  # pyright: ignore
        for history in comparison.histories_of(arm).values():
            shape = marker(comparison, arm)
            x, y = history.validation_tokens, history.validation_loss
            ax.plot(x, y, shape, ms=3.6, mew=0, alpha=0.85, **style)  # pyright: ignore
            points.append(y)
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
    """Training loss minus the first arm's on the very same batches: their noise cancels.

    The mean over the seeds that both have; thin lines are single seeds.
    """
    base, *others = comparison.arms
    pairs = {arm: _differences(comparison, base, arm) for arm in others}
    pairs = {arm: found for arm, found in pairs.items() if found}
    if not pairs:
        return None
    figure, ax = axes(right=0.75)
    longest = max((found[0][0] for found in pairs.values()), key=len)
    ax.plot(longest[[0, -1]], [0, 0], color=colour(comparison, base), lw=1.1)
    ends, late = {base: 0.0}, [np.zeros(1)]
    for arm, found in pairs.items():
        style = {"color": colour(comparison, arm)}
        n = min(len(tokens) for tokens, _ in found)
        mean = np.mean([difference[:n] for _, difference in found], axis=0)
        if len(found) > 1:
            for tokens, difference in found:
                ax.plot(tokens, difference, lw=0.5, alpha=0.6, **style)  # pyright: ignore
        ax.plot(found[0][0][:n], mean, **style)  # pyright: ignore
        ends[arm] = mean[-1]
        late.append(mean[len(mean) // 10 :])
    low, high = min(map(np.min, late)), max(map(np.max, late))
    margin = 0.12 * (high - low) or 0.01
    ax.set_ylim(low - margin, high + margin)
    token_axis(ax)
    ax.set_ylabel(f"training loss minus {base.label}'s")
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
    figure, ax = axes(height=1.0 + 0.24 * len(names), left=0.26, right=0.97, top_lines=1)
    ax.axvline(0, color=colour(comparison, base), lw=1.1)
    for arm in others:
        x = [means[arm].get(name, np.nan) - means[base][name] for name in names]
        style = {"color": colour(comparison, arm), "label": arm.label, "alpha": 0.85}
        ax.plot(x, range(len(names)), marker(comparison, arm), ms=4.5, mew=0, **style)  # pyright: ignore
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(f"bits per byte minus {base.label}'s (left is better)")
    figure.legend(
        loc="upper center", ncols=4, frameon=False, handletextpad=0.1, columnspacing=1.2,
        borderpad=0,
    )  # fmt: skip
    return figure


def _mean_curve(comparison: Comparison, arm: AnyArm) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens, smoothed training loss) of an arm, mean over its seeds as far as all have come."""
    histories = [h for h in comparison.histories_of(arm).values() if len(h.loss)]
    if not histories:
        return None
    n = min(len(h.loss) for h in histories)
    return histories[0].tokens[:n], smooth(np.mean([h.loss[:n] for h in histories], axis=0))


def _differences(
    comparison: Comparison, base: AnyArm, arm: AnyArm
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, smoothed difference to the base) of each seed that both have."""
    bases, found = comparison.histories_of(base), []
    for seed, history in comparison.histories_of(arm).items():
        other: History | None = bases.get(seed)
        n = min(len(history.loss), len(other.loss)) if other is not None else 0
        if other is not None and n:
            found.append((history.tokens[:n], smooth(history.loss[:n] - other.loss[:n])))
    return found


def _domain_means(comparison: Comparison, arm: AnyArm) -> dict[str, float]:
    rows = comparison.finished(arm)
    names = set.intersection(*(set(row.domains) for row in rows)) if rows else set()
    return {name: float(np.mean([row.domains[name] for row in rows])) for name in names}
