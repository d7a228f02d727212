"""Picture of an exchange of rows between devices.

Shapes: P devices.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.report.style import INK, WIDTH

DARK = 0.6  # of the colour scale, from which numbers are white


def rows_sent(sent_PP: np.ndarray, label: str = "rows") -> Figure:
    """A map of the rows that each device (down) sends to each one (across), with their sums.

    Rows on the diagonal stay where they are.

    Args:
      sent_PP: rows from source (first axis) to destination.
      label: what is counted.
    """
    n = len(sent_PP)
    figure = Figure(figsize=(WIDTH, 0.86 * WIDTH), dpi=200)
    ax = figure.subplots()
    figure.subplots_adjust(0.1, 0.07, 0.91, 0.88)
    most = max(float(sent_PP.max()), 1.0)
    ax.imshow(sent_PP, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    for source, destination in np.ndindex(n, n):
        rows = sent_PP[source, destination]
        ink = "white" if rows > DARK * most else INK
        weight = "bold" if source == destination else "normal"
        ax.text(
            destination, source, f"{rows:g}", ha="center", va="center", color=ink, weight=weight
        )
    _sums(ax, sent_PP)
    ax.set(xticks=range(n), yticks=range(n), ylabel="from device")
    ax.set_title(f"{label}, to device", pad=7)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return figure


def _sums(ax, sent_PP: np.ndarray) -> None:
    """The sum of each row at its right, that of each column below it."""
    n = len(sent_PP)
    for device in range(n):
        ax.text(n - 0.3, device, f"{sent_PP[device].sum():g}", va="center", color=INK)
        ax.text(device, n - 0.2, f"{sent_PP[:, device].sum():g}", ha="center", color=INK)
    ax.text(n - 0.3, n - 0.2, f"{sent_PP.sum():g}", color=INK)
