"""Pictures of laws: points of trained models, the fitted curve, and its band.

Shapes: P points, S seeds, X places where the curve is drawn.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dsmoe_jax.report.names import short
from dsmoe_jax.report.style import ARM_COLOURS, INK, MARKERS, axes, colour, label_ends, marker
from dsmoe_jax.study.experiment import AnyArm
from dsmoe_jax.study.results import Comparison


@dataclasses.dataclass(frozen=True)
class Curve:
    """A fitted law with the points that it was fitted to.

    Attributes:
      name: in the legend.
      x_P, y_SP: the points, a row a seed.
      x_X, y_X: the curve.
      band: its ends, each (X,); None without an interval.
    """

    name: str
    x_P: np.ndarray
    y_SP: np.ndarray
    x_X: np.ndarray
    y_X: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None


def places(low: float, high: float) -> np.ndarray:
    """Places for a curve, even on a logarithmic axis."""
    return np.geomspace(low, high, 80)


def curves(found: list[Curve], x_label: str, y_label: str) -> Figure:
    """Curves over a logarithmic axis, in the order of the legend."""
    figure, ax = axes(top_lines=1)
    for i, curve in enumerate(found):
        _draw(ax, curve, ARM_COLOURS[(1 + i) % 7], MARKERS[i % 7])
    _cut(ax, found, [])
    _label(ax, found, x_label, y_label)
    figure.legend(loc="upper center", ncols=len(found), frameon=False, borderpad=0)
    return figure


def arms_over(
    comparison: Comparison,
    curve: Curve,
    arms: dict[AnyArm, tuple[float, float]],
    x_label: str,
    y_label: str,
) -> Figure:
    """A baseline's curve with the arms of a comparison beside it, each at (x, y)."""
    figure, ax = axes(right=0.75, top_lines=1)
    _draw(ax, curve, INK, "o")
    for arm, (x, y) in arms.items():
        ax.plot([x], [y], marker(comparison, arm), ms=6, color=colour(comparison, arm), zorder=4)
    _cut(ax, [curve], [y for _, y in arms.values()])
    _label(ax, [curve], x_label, y_label)
    figure.legend(loc="upper center", frameon=False, borderpad=0)
    label_ends(comparison, ax, {arm: y for arm, (_, y) in arms.items()})
    return figure


def _draw(ax: Axes, curve: Curve, ink: str, sign: str) -> None:
    if curve.band is not None:
        ax.fill_between(curve.x_X, *curve.band, color=ink, alpha=0.15, lw=0)
    ax.plot(curve.x_X, curve.y_X, color=ink, lw=1.2, label=short(curve.name, 48))
    ax.plot(curve.x_P, curve.y_SP.mean(axis=0), sign, ms=5, color=ink, zorder=3)
    if len(curve.y_SP) > 1:
        for y_P in curve.y_SP:
            ax.plot(curve.x_P, y_P, ".", ms=3, alpha=0.5, color=ink)


def _cut(ax: Axes, found: list[Curve], others: list[float]) -> None:
    """Limits the y axis to points and curves: a band may be far wider than what was measured."""
    drawn = [values.ravel() for curve in found for values in (curve.y_SP, curve.y_X)]
    values = np.concatenate([*drawn, others])
    margin = 0.15 * (values.max() - values.min()) or 0.01
    ax.set_ylim(values.min() - margin, values.max() + margin)


def _label(ax: Axes, found: list[Curve], x_label: str, y_label: str) -> None:
    """Labels of the axes, and a tick at every point."""
    ax.set_xscale("log")
    values = sorted({float(x) for curve in found for x in curve.x_P})
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(values, [f"{value:.3g}" for value in values])
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
