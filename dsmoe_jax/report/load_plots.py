"""Pictures of the load of the experts.

Shapes: L MoE layers, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.report import load_over_training as over_training
from dsmoe_jax.report.load_maps import load_bar, load_map
from dsmoe_jax.report.names import short
from dsmoe_jax.report.style import WIDTH, axes, colour, label_ends, smooth, token_axis
from dsmoe_jax.study.histories import History
from dsmoe_jax.study.results import Comparison


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
        x_edges = np.arange(n_experts + 1) + 0.5
        y_edges = np.arange(n_layers + 1) + 0.5
        image = load_map(ax, x_edges, y_edges, load_LE)
        ax.set_title(short(arm.label, 60), loc="left", color=colour(comparison, arm), pad=3)
        ax.set_xticks([1, *range(8, n_experts + 1, 8)])
    panels[-1].set_xlabel("routed expert (rows are layers)")
    assert image is not None
    height = figure.get_figheight()
    figure.subplots_adjust(0.06, 0.62 / height, 0.86, 1 - 0.24 / height, hspace=0.28 / panel + 0.25)
    load_bar(figure, image, (0.885, 0.3, 0.022, 0.4))
    return figure


def load_over_training(comparison: Comparison) -> Figure | None:
    """Load of every expert and MaxVio by layer: first seed of the arm with the most experts."""
    runs = {}
    for arm in comparison.arms:
        for history in comparison.histories_of(arm).values():
            if history.loads is not None:
                runs.setdefault(arm.label, history.loads)
    largest = max(runs, key=lambda label: runs[label].load_SLE.shape[-1], default=None)
    return over_training.draw({largest: runs[largest]}) if largest is not None else None
