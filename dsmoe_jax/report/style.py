"""Style of the pictures in a report: colours, type, axes, and names at the ends of lines.

All colours are in `PALETTE`, so that the report can swap them in dark mode.  Those of the arms
remain distinct for colour-blind readers; markers differ as well.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from dsmoe_jax.report.names import short
from dsmoe_jax.study.experiment import AnyArm
from dsmoe_jax.study.results import Comparison

# Colour in light mode -> colour in dark mode.
PALETTE = {
    "#4a4a4a": "#d0d0d0",
    "#2e93d1": "#4fa8e8",
    "#12a383": "#1fb596",
    "#3b3b98": "#8a86f5",
    "#d1440c": "#ff6a3d",
    "#b08a00": "#e0c23c",
    "#c05a9b": "#e58cc6",
    "#202124": "#e8e6e1",  # text
    "#73716c": "#a19e97",  # axes
    "#e4e1da": "#35373c",  # grid
}
ARM_COLOURS = list(PALETTE)[:7]
INK, AXIS, GRID = list(PALETTE)[7:]
MARKERS = "os^DvPX"
NO_NAMES: Mapping[AnyArm, str] = MappingProxyType({})
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.6,
    "grid.color": GRID,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a name with two $ is a name
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "dsmoe_jax",  # the same numbers give the same file
}
WIDTH = 4.5  # inches: a picture is as wide as a phone and half as wide as a page


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Context in which figures are drawn and saved in this style, without the user's settings."""
    settings = {**matplotlib.rcParamsDefault, **STYLE}
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # pyright: ignore
        # Text stays text in an SVG: the reader's font has the sign, if matplotlib's has not.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def colour(comparison: Comparison, arm: AnyArm) -> str:
    """Colour of an arm: the same in every picture, also when only some arms are shown."""
    return ARM_COLOURS[comparison.experiment.arms.index(arm) % len(ARM_COLOURS)]


def marker(comparison: Comparison, arm: AnyArm) -> str:
    """Marker of an arm: the same in every picture."""
    return MARKERS[comparison.experiment.arms.index(arm) % len(MARKERS)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the last twentieth of all values; shorter at the beginning."""
    window = max(len(values) // 20, 1)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def axes(
    height: float = 3.1, left: float = 0.15, right: float = 0.97, top_lines: int = 0
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes and room above for lines of a legend.

    Args:
      height: of the figure, in inches.
      left, right: edges of the axes, as shares of the width.
      top_lines: of text above the axes.
    """
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.subplots()
    figure.subplots_adjust(left, 0.46 / height, right, 1 - (0.08 + 0.26 * top_lines) / height)
    return figure, ax


def token_axis(ax: Axes) -> None:
    """Labels the x axis with the tokens trained on, as 250k or 1.5G."""
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("tokens trained on")


def label_ends(
    comparison: Comparison,
    ax: Axes,
    ends: Mapping[AnyArm, float],
    names: Mapping[AnyArm, str] = NO_NAMES,
    colours: Mapping[AnyArm, str] = NO_NAMES,
) -> None:
    """Writes each arm's name beside the end of its line, moved apart where they would touch.

    Args:
      comparison: for the colours.
      ax: with the lines.
      ends: the last value of each line.
      names: in place of the arms' labels.
      colours: in place of the arms' colours.
    """
    if ax.get_xscale() == "linear":
        last = max(float(np.max(line.get_xdata())) for line in ax.lines)
        ax.set_xlim(right=1.015 * last)  # room for a marker at the end
    low, high = ax.get_ylim()
    gap = 0.065
    order = sorted(ends, key=lambda arm: ends[arm])
    wanted = [(ends[arm] - low) / (high - low) for arm in order]
    places = np.clip(wanted, 0.0, 1.0)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places -= max(places[-1] - 1.0, 0.0)
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - gap)
    for arm, y, place in zip(order, wanted, places, strict=True):
        line = {"arrowstyle": "-", "lw": 0.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        ink = colours.get(arm) or colour(comparison, arm)
        ax.annotate(
            short(names.get(arm, arm.label)), (1.0, y), (1.06, float(place)),
            xycoords="axes fraction", va="center", color=ink,
            annotation_clip=False, arrowprops={**line, "color": ink},
        )  # fmt: skip
