"""Heat maps of loads: purple is too little, white the fair share, orange too much.

Shapes: G domains, E routed experts, X rows of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from dsmoe_jax.report.names import short
from dsmoe_jax.report.style import INK, WIDTH

ROW, TITLE, BELOW = 0.125, 0.26, 0.42  # inches: of a row, above a map, below the last one


class LoadMap(NamedTuple):
    """A map of a figure: its title, the names of its rows, and the load of each row (X, E)."""

    title: str
    names: Sequence[str]
    load_XE: np.ndarray
    colour: str = INK


def stacked(maps: Sequence[LoadMap], label: str, row: float = ROW) -> Figure:
    """One map below the other, with one colour scale; `label` says what the columns are.

    Args:
      maps: the first one on top.
      label: of the columns.
      row: inches of a row; of one map with few rows more, so that the scale fits beside it.
    """
    heights = [TITLE + row * len(shown.names) for shown in maps]
    height = sum(heights) + BELOW
    figure = Figure(figsize=(WIDTH, height), dpi=200)
    top = height
    cells = None
    for shown, taken in zip(maps, heights, strict=True):
        top -= taken
        ax = figure.add_axes((0.24, top / height, 0.63, (taken - TITLE) / height))
        n_rows, n_experts = shown.load_XE.shape
        edges = np.arange(n_experts + 1) + 0.5, np.arange(n_rows + 1) + 0.5
        cells = load_map(ax, *edges, shown.load_XE)
        ax.set_title(shown.title, loc="left", color=shown.colour, pad=3)
        names = [short(name, 16) for name in shown.names]
        ax.set_yticks(range(1, n_rows + 1), names, fontsize=7)
        ax.set_xticks([])
    assert cells is not None, "there is a map"
    figure.text(0.24, 0.12 / height, label)
    load_bar(figure, cells, (0.89, (height - 1.5) / height, 0.022, 1.1 / height))
    return figure


def order_by_domain(load_GE: np.ndarray) -> np.ndarray:
    """The experts in the order of the domain that uses each most, int (E,).

    The experts of one domain stand in the order of its load, the most loaded first.
    """
    return np.lexsort((-load_GE.max(axis=0), load_GE.argmax(axis=0)))


def load_map(ax: Axes, x_edges: np.ndarray, y_edges: np.ndarray, load: np.ndarray) -> QuadMesh:
    """A heat map of loads; a load of 1 is in the middle of the colour scale."""
    norm = TwoSlopeNorm(1.0, 0.0, 3.0)
    # Rasterized: an SVG would otherwise hold a shape for every cell.
    cells = ax.pcolormesh(x_edges, y_edges, load, norm=norm, cmap="PuOr_r", rasterized=True)
    ax.invert_yaxis()
    ax.set_yticks(sorted({1, len(load)}))
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, pad=2)
    return cells


def load_bar(figure: Figure, cells: QuadMesh, place: tuple[float, float, float, float]) -> Colorbar:
    """The colour scale beside heat maps; `place` is left, bottom, width and height."""
    bar = figure.colorbar(cells, cax=figure.add_axes(place), ticks=[0, 1, 2, 3])
    bar.ax.set_yticklabels(["0", "1", "2", "≥ 3"])
    bar.outline.set_visible(False)  # pyright: ignore
    bar.solids.set(rasterized=False, edgecolor="face")  # pyright: ignore
    return bar
