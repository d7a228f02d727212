"""Picture of the experts of a layer: how wide each is, which are shared, which a token uses.

Shapes: K activated routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.report.style import AXIS, PALETTE, WIDTH

SHARED = "#d1440c"
CHOSEN = "#2e93d1"
IDLE = "#e4e1da"
assert {SHARED, CHOSEN, IDLE} <= PALETTE.keys()
ROW, BELOW = 0.56, 0.24  # inches: of a model, below the last one
GAP = 0.12  # between two experts, relative to the width of the narrowest


class ExpertsOfToken(NamedTuple):
    """The experts of a layer, and the routed ones that a token uses, K of their ids."""

    moe: MoEConfig
    ids_K: Sequence[int]


def of_a_token(models: Mapping[str, ExpertsOfToken]) -> Figure:
    """A row for each model: shared experts first, then the routed ones by their id.

    All rows are equally long, and a block is as wide as its expert's share of the layer.

    Args:
      models: by title.
    """
    figure = Figure(figsize=(WIDTH, ROW * len(models) + BELOW), dpi=200)
    rows = figure.subplots(len(models), squeeze=False)[:, 0]
    height = figure.get_figheight()
    figure.subplots_adjust(0.02, (BELOW + 0.06) / height, 0.98, 1 - 0.2 / height, hspace=0.8)
    for ax, (title, found) in zip(rows, models.items(), strict=True):
        _row(ax, found)
        ax.set_title(title, loc="left", pad=3)
    for place, (name, ink) in zip((0.02, 0.2, 0.54), _LEGEND.items(), strict=True):
        figure.text(place, 0.06 / height, name, color=ink)
    return figure


_LEGEND = {"shared": SHARED, "chosen by the router": CHOSEN, "idle for this token": AXIS}


def _row(ax: Axes, found: ExpertsOfToken) -> None:
    moe = found.moe
    n_shared = moe.n_shared_experts
    n = n_shared + moe.n_routed_experts
    chosen = {n_shared + int(i) for i in found.ids_K}
    for i in range(n):
        ink = SHARED if i < n_shared else CHOSEN if i in chosen else IDLE
        ax.add_patch(Rectangle((i + GAP / 2, 0), 1 - GAP, 1, color=ink, lw=0))
    ax.set(xlim=(0, n), ylim=(0, 1))
    ax.axis("off")
