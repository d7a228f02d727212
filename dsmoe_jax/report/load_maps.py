"""Heat maps of loads: purple is too little, white the fair share, orange too much."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure


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
