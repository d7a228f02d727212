"""Picture of the load of every expert and MaxVio over training, layer by layer.

Shapes: S logged steps, L MoE layers, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from dsmoe_jax.report.load_maps import load_bar, load_map
from dsmoe_jax.report.names import short
from dsmoe_jax.report.style import WIDTH
from dsmoe_jax.runs.summaries import maxvio
from dsmoe_jax.study.histories import Loads

STRETCHES = 24  # columns of a heat map


def draw(runs: Mapping[str, Loads]) -> Figure:
    """A figure with one column a run: a heat map for each layer, and MaxVio of all layers below.

    Args:
      runs: by title; of a path only the last two parts are shown.
    """
    n_layers = max(run.load_SLE.shape[1] for run in runs.values())
    panel = min(0.4 + 0.014 * max(run.load_SLE.shape[2] for run in runs.values()), 1.4)
    height = 0.95 + panel * n_layers + 1.0
    figure = Figure(figsize=(WIDTH, height), dpi=200)
    panels = figure.subplots(
        n_layers + 1, len(runs), sharex="col", squeeze=False,
        gridspec_kw={"height_ratios": [panel] * n_layers + [1.0]},
    )  # fmt: skip
    image = None
    for column, (title, run) in zip(panels.T, runs.items(), strict=True):
        name = "/".join(title.split("/")[-2:])
        column[0].set_title(short(name, 60 // len(runs)), loc="left", pad=3)
        for layer, ax in enumerate(column[:-1]):
            if layer < run.load_SLE.shape[1]:
                image = _heat_map(ax, run.tokens_S, run.load_SLE[:, layer])
            else:
                ax.set_axis_off()
        _violations(column[-1], run)
    top = max(ax.get_ylim()[1] for ax in panels[-1])
    for ax in panels[-1]:
        ax.set_ylim(0, top)
        ax.label_outer()
    for layer, ax in enumerate(panels[:-1, 0]):
        ax.set_ylabel(f"layer {layer + 1}")
    panels[-1, 0].set_ylabel("MaxVio")
    figure.supxlabel("tokens trained on", fontsize="medium", y=0.04 / height)
    figure.subplots_adjust(0.13, 0.46 / height, 0.86, 1 - 0.24 / height, 0.3, 0.2)
    assert image is not None
    load_bar(figure, image, (0.885, 0.5, 0.022, 0.3)).ax.set_title("load", pad=5)
    return figure


def _heat_map(ax, tokens_S: np.ndarray, load_SE: np.ndarray):
    """Heat map of a layer, experts over training."""
    # A cell is the mean of several logged steps: one column a step would be too thin.
    stretches = np.array_split(np.arange(len(tokens_S)), min(len(tokens_S), STRETCHES))
    mean_SE = np.array([load_SE[steps].mean(axis=0) for steps in stretches])
    ends_S = np.array([tokens_S[steps[-1]] for steps in stretches])
    x_edges = np.append(0.0, ends_S)
    y_edges = np.arange(load_SE.shape[1] + 1) + 0.5
    return load_map(ax, x_edges, y_edges, mean_SE.T)


def _violations(ax, run: Loads) -> None:
    n_layers = run.load_SLE.shape[1]
    maxvio_SL = np.array([maxvio(load_LE) for load_LE in run.load_SLE])
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1.0, n_layers))
    for maxvio_S, shade in zip(maxvio_SL.T, shades, strict=True):
        ax.plot(run.tokens_S, maxvio_S, color=shade, lw=0.9)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
