"""The pictures of a report.  A new one is a function and a line in `PLOTS`.

Every function takes a `Comparison` and returns a matplotlib figure, or None where there is nothing
to show.

Shapes: S logged steps, L MoE layers, E routed experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.report import load_over_training as load_pictures
from dsmoe_jax.report.style import (
    WIDTH,
    axes,
    colour,
    label_ends,
    load_bar,
    load_map,
    marker,
    smooth,
    styled,
    token_axis,
)
from dsmoe_jax.study.results import Comparison, History
from dsmoe_jax.study.spec import Arm


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture, what is above it and what is below it."""

    title: str
    caption: str
    draw: Callable[[Comparison], Figure | None]


def final_loss(comparison: Comparison) -> Figure | None:
    """Every run's validation loss as a dot, every arm's mean as a stroke."""
    arms = [arm for arm in comparison.arms if comparison.of_arm(arm)]
    if not arms:
        return None
    figure, ax = axes(height=0.75 + 0.34 * len(arms), left=0.26, right=0.97)
    for y, arm in enumerate(arms):
        losses = [row.validation_loss for row in comparison.of_arm(arm)]
        style = {"color": colour(comparison, arm), "zorder": 3}
        ax.plot([np.mean(losses)] * 2, [y - 0.3, y + 0.3], lw=2.2, **style)  # pyright: ignore
        ax.plot(losses, [y] * len(losses), marker(comparison, arm), ms=5, alpha=0.75, **style)  # pyright: ignore
    ax.set_yticks(range(len(arms)), [arm.label for arm in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.08)
    ax.set_xlabel("validation loss, nats per token (lower is better)")
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


def maxvio(comparison: Comparison) -> Figure | None:
    """MaxVio of single batches over training, mean over layers and seeds, smoothed."""
    return _violations(comparison, lambda history: smooth(history.maxvio_SL.mean(axis=1)))


def maxvio_running(comparison: Comparison) -> Figure | None:
    """MaxVio of the load of the last 100 steps or so, mean over layers and seeds."""
    return _violations(comparison, lambda history: history.maxvio_running_SL.mean(axis=1))


def _violations(
    comparison: Comparison, values_of: Callable[[History], np.ndarray]
) -> Figure | None:
    curves = {}
    for arm in comparison.arms:
        histories = [h for h in comparison.histories_of(arm).values() if h.loads is not None]
        if histories:
            n = min(len(values_of(h)) for h in histories)
            mean = np.mean([values_of(h)[:n] for h in histories], axis=0)
            curves[arm] = histories[0].tokens[:n], mean
    if not curves:
        return None
    figure, ax = axes(right=0.75)
    for arm, (tokens, values) in curves.items():
        ax.plot(tokens, values, color=colour(comparison, arm))
    ax.set_ylim(bottom=0)
    token_axis(ax)
    ax.set_ylabel("MaxVio (0 is perfect balance)")
    label_ends(comparison, ax, {arm: values[-1] for arm, (_, values) in curves.items()})
    return figure


def expert_load(comparison: Comparison) -> Figure | None:
    """Load of every expert in every layer on the held-out text, of the first seed."""
    loads = {}
    for arm in comparison.arms:
        for history in comparison.histories_of(arm).values():
            if history.load_LE is not None:
                loads.setdefault(arm, history.load_LE)
    if not loads:
        return None
    rows = max(load.shape[0] for load in loads.values())
    panel = min(0.2 + 0.1 * rows, 1.6)
    figure = Figure(figsize=(WIDTH, 0.75 + (panel + 0.28) * len(loads)))
    panels = figure.subplots(len(loads), squeeze=False)[:, 0]
    image = None
    for ax, (arm, load_LE) in zip(panels, loads.items(), strict=True):
        n_layers, n_experts = load_LE.shape
        edges = np.arange(n_experts + 1) + 0.5, np.arange(n_layers + 1) + 0.5
        image = load_map(ax, *edges, load_LE)
        ax.set_title(arm.label, loc="left", color=colour(comparison, arm), pad=3)
        ax.set_xticks([1, *range(8, n_experts + 1, 8)])
    panels[-1].set_xlabel("routed expert (rows are layers)")
    assert image is not None
    figure.subplots_adjust(0.06, 0.62 / figure.get_figheight(), 0.86, 1 - 0.24 / figure.get_figheight(), hspace=0.28 / panel + 0.25)  # fmt: skip  # noqa: E501
    load_bar(figure, image, (0.885, 0.3, 0.022, 0.4))
    return figure


def load_over_training(comparison: Comparison) -> Figure | None:
    """Load of every expert and MaxVio by layer: the arm with the most experts, its first seed."""
    runs = {}
    for arm in comparison.arms:
        for history in comparison.histories_of(arm).values():
            if history.loads is not None:
                runs.setdefault(arm.label, history.loads)
    largest = max(runs, key=lambda label: runs[label].load_SLE.shape[-1], default=None)
    return load_pictures.draw({largest: runs[largest]}) if largest is not None else None


PLOTS: dict[str, Plot] = {
    "final_loss": Plot(
        "Where the runs ended",
        "Each dot is one run (one seed), each stroke the mean of an arm.",
        final_loss,
    ),
    "learning_curves": Plot(
        "Learning curves",
        "Lines: training loss, a running mean over a twentieth of the logged steps and over seeds."
        " Markers: loss on the held-out text. The axis is cut above.",
        learning_curves,
    ),
    "loss_difference": Plot(
        "The same, as differences",
        "All arms see the same batches in the same order, so subtracting the first arm's loss"
        " removes what easy and hard batches do to all. Below zero is better.",
        loss_difference,
    ),
    "domains": Plot(
        "By domain",
        "Bits per byte on the held-out text of each domain, as differences to the first arm; the"
        " domains it finds easiest are on top.",
        domains,
    ),
    "maxvio": Plot(
        "Load balance over training",
        "MaxVio = (largest load − mean load) / mean load of a layer's experts within a batch; mean"
        " over layers and seeds, smoothed. More experts make a larger MaxVio likelier.",
        maxvio,
    ),
    "maxvio_running": Plot(
        "The same over a window",
        "MaxVio of the load of the last 100 steps or so: what one batch happens to want is averaged"
        " out, what stays are experts that all batches prefer.",
        maxvio_running,
    ),
    "expert_load": Plot(
        "Who does the work",
        "Load of every routed expert on the held-out text, relative to a perfectly even load (1);"
        " first seed. Orange experts get too much, purple ones too little.",
        expert_load,
    ),
    "load_over_training": Plot(
        "Load over training",
        "Of the model with the most experts, first seed. Above, a row a layer: load of every routed"
        " expert relative to an even load, in the logged batches of each stretch of training."
        " Below: MaxVio of single batches, a line a layer, deeper layers darker.",
        load_over_training,
    ),
}


def draw(comparison: Comparison) -> dict[str, Figure]:
    """All pictures that have something to show, by name."""
    with styled():
        figures = {name: plot.draw(comparison) for name, plot in PLOTS.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _mean_curve(comparison: Comparison, arm: Arm) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens, smoothed training loss) of an arm, mean over its seeds as far as all have come."""
    histories = [h for h in comparison.histories_of(arm).values() if len(h.loss)]
    if not histories:
        return None
    n = min(len(h.loss) for h in histories)
    return histories[0].tokens[:n], smooth(np.mean([h.loss[:n] for h in histories], axis=0))


def _differences(
    comparison: Comparison, base: Arm, arm: Arm
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, smoothed difference to the base) of each seed that both have."""
    bases, found = comparison.histories_of(base), []
    for seed, history in comparison.histories_of(arm).items():
        other: History | None = bases.get(seed)
        n = min(len(history.loss), len(other.loss)) if other is not None else 0
        if other is not None and n:
            found.append((history.tokens[:n], smooth(history.loss[:n] - other.loss[:n])))
    return found


def _domain_means(comparison: Comparison, arm: Arm) -> dict[str, float]:
    rows = comparison.of_arm(arm)
    names = set.intersection(*(set(row.domains) for row in rows)) if rows else set()
    return {name: float(np.mean([row.domains[name] for row in rows])) for name in names}
