"""Pictures of plans: what fills a chip's memory, and what bounds the time of a step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsmoe_jax.planning.planner import Plan
from dsmoe_jax.planning.roofline import Roofline
from dsmoe_jax.report.style import ARM_COLOURS, INK, WIDTH

ROW = 0.3  # inches, of a plan
LEGEND_ROW = 0.2
IN_A_ROW = 3  # names in a row of the legend
RESOURCES = {"compute": "compute", "memory": "HBM", "network": "network"}


def memory(plans: Mapping[str, Plan], hbm_gb: float, usable: float) -> Figure:
    """A bar for each plan, GB of a chip by category; lines at what may be planned, and at its end.

    Args:
      plans: by name.
      hbm_gb: memory of a chip.
      usable: share of it that a plan may take.
    """
    categories = list(dict.fromkeys(name for plan in plans.values() for name in plan.memory))
    figure, ax = _bars(list(plans), n_names=len(categories))
    left = np.zeros(len(plans))
    for category, ink in zip(categories, ARM_COLOURS, strict=False):
        gb = np.array([plan.memory.get(category, 0.0) for plan in plans.values()])
        ax.barh(range(len(plans)), gb, 0.7, left, color=ink, label=category)
        left += gb
    for place, style, name in ((usable * hbm_gb, ":", "planned "), (hbm_gb, "-", " the chip")):
        ax.axvline(place, color=INK, lw=0.9, ls=style)
        side = "right" if name.endswith(" ") else "left"
        ax.text(place, -0.52, name, ha=side, va="bottom", fontsize=7)
    ax.set_xlim(right=1.15 * hbm_gb)
    ax.set_xlabel("GB of a chip")
    _legend(figure)
    return figure


def times(bounds: Mapping[str, Roofline]) -> Figure:
    """Three bars for each plan: least seconds of compute, HBM and network of a step.

    Args:
      bounds: by name of the plan.
    """
    figure, ax = _bars(list(bounds), n_names=len(RESOURCES), row=2 * ROW)
    thick = 0.8 / len(RESOURCES)
    for i, ((resource, name), ink) in enumerate(zip(RESOURCES.items(), ARM_COLOURS, strict=False)):
        seconds = [getattr(bound, resource) for bound in bounds.values()]
        places = np.arange(len(bounds)) + (i - 1) * thick
        ax.barh(places, seconds, 0.9 * thick, color=ink, label=name)
    ax.set_xlabel("seconds of a step, at least")
    _legend(figure)
    return figure


def _bars(names: list[str], n_names: int, row: float = ROW) -> tuple[Figure, Axes]:
    """Axes for a row a plan, the first on top, with room above for a legend of so many names."""
    above = LEGEND_ROW * -(-n_names // IN_A_ROW) + 0.2
    height = above + row * len(names) + 0.5
    figure = Figure(figsize=(WIDTH, height), dpi=200)
    ax = figure.subplots()
    figure.subplots_adjust(0.36, 0.46 / height, 0.97, 1 - above / height)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    return figure, ax


def _legend(figure: Figure) -> None:
    figure.legend(loc="upper left", ncols=IN_A_ROW, frameon=False, fontsize=7.5, handlelength=1.0)
