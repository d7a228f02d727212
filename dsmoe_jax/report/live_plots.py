"""Pictures of a run on its way, from the rows of metrics.jsonl.

A long run has more rows than a picture has dots: rows are taken together in stretches, of which a
line shows the mean and a band the extremes, so that no spike is lost.

Shapes: S training rows, X stretches, L MoE layers, E routed experts, H hosts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, PercentFormatter

from dsmoe_jax.report.blocks import Picture
from dsmoe_jax.report.load_maps import ROW, LoadMap, stacked
from dsmoe_jax.report.style import ARM_COLOURS, WIDTH, axes, smooth, styled, token_axis

Rows = list[dict[str, Any]]

GREY, BLUE, GREEN, _, RED, YELLOW, _ = ARM_COLOURS
STRETCHES = 240
RECENT = 20  # rows of the map of the load


class LivePicture(NamedTuple):
    """A picture: its title, its caption, and how it is drawn (None: there is nothing to draw)."""

    title: str
    caption: str
    draw: Callable[[Rows], Figure | None]


def draw(rows: Rows) -> list[Picture]:
    """The pictures that there are numbers for.

    Args:
      rows: of metrics.jsonl, one a step.
    """
    found = []
    with styled():
        for name, picture in PICTURES.items():
            figure = picture.draw(rows)
            if figure is not None:
                found.append(Picture(name, picture.title, picture.caption, figure))
    return found


def _loss(rows: Rows) -> Figure | None:
    trained = _with(rows, "loss")
    if not trained:
        return None
    figure, ax = axes(right=0.96)
    x, loss_S = _column(trained, "tokens"), _column(trained, "loss")
    finite = np.isfinite(loss_S)
    x, loss_S = x[finite], loss_S[finite]
    if not len(x):
        return None
    _band(ax, x, loss_S, BLUE)
    ax.plot(*_stretches(x, smooth(loss_S), np.mean), color=BLUE, label="training")
    held_out = _with(trained, "validation_loss")
    if held_out:
        values = _column(held_out, "validation_loss")
        ax.plot(_column(held_out, "tokens"), values, "o", ms=4, mew=0, color=RED, label="held-out")
        ax.legend(frameon=False, loc="upper right")
    # The first steps would take all of the height.
    late = loss_S[len(loss_S) // 4 :]
    low, high = loss_S.min(), np.percentile(late, 99)
    margin = 0.08 * (high - low) or 0.01
    ax.set_ylim(low - margin, high + margin)
    ax.set_ylabel("nats per token")
    token_axis(ax)
    return figure


def _speed(rows: Rows) -> Figure | None:
    found = _with(rows, "tokens_per_second")
    if not found:
        return None
    has_peak = any("flops_utilization" in row for row in found)
    figure, panels = _panels(2 if has_peak else 1)
    _line(panels[0], found, "tokens_per_second", GREEN)
    panels[0].set_ylabel("tokens/s")
    panels[0].yaxis.set_major_formatter(EngFormatter(sep=""))
    if has_peak:
        _line(panels[1], _with(found, "flops_utilization"), "flops_utilization", BLUE)
        panels[1].set_ylabel("MFU")
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    for ax in panels:
        ax.set_ylim(bottom=0)
    token_axis(panels[-1])
    return figure


def _gradient(rows: Rows) -> Figure | None:
    found = _with(rows, "grad_norm")
    if not found:
        return None
    figure, panels = _panels(2)
    norms = _column(found, "grad_norm")
    finite = [row for row, norm in zip(found, norms, strict=True) if np.isfinite(norm) and norm > 0]
    _line(panels[0], finite, "grad_norm", RED)
    if finite:
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter("{x:g}")  # text in an SVG has no raised digits
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("gradient norm")
    _line(panels[1], found, "learning_rate", GREY)
    panels[1].set_ylabel("learning rate")
    panels[1].set_ylim(bottom=0)
    token_axis(panels[-1])
    return figure


def _load(rows: Rows) -> Figure | None:
    found = _with(rows, "load")[-RECENT:]
    if not found:
        return None
    shape = np.shape(found[-1]["load"])
    same = [row["load"] for row in found if np.shape(row["load"]) == shape]
    load_LE = np.mean(same, axis=0)
    load_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
    names = [f"layer {i + 1}" for i in range(len(load_LE))]
    columns = f"routed experts, 1 to {load_LE.shape[1]}"
    return stacked([LoadMap("", names, load_LE)], columns, max(ROW, 1.0 / len(names)))


def _violations(rows: Rows) -> Figure | None:
    found = _with(rows, "maxvio_running")
    return _over_layers(found, "maxvio_running", "MaxVio of the last 100 steps or so")


def _drops(rows: Rows) -> Figure | None:
    found = [row for row in _with(rows, "dropped") if "load" in row]
    if not any(np.any(row["dropped"]) for row in found):
        return None
    shares = []
    for row in found:
        sent_L = np.maximum(np.sum(row["load"], axis=1), 1)
        shares.append({"tokens": row["tokens"], "share": list(row["dropped"] / sent_L)})
    figure = _over_layers(shares, "share", "of the assignments")
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    return figure


def _steps(rows: Rows) -> Figure | None:
    found = [
        {"tokens": row["tokens"], **row["step_seconds"]} for row in _with(rows, "step_seconds")
    ]
    if not found:
        return None
    colours = {"p99": RED, "p95": YELLOW, "p50": BLUE}
    lines = {key: (_column(found, key), colour) for key, colour in colours.items()}
    return _seconds(_column(found, "tokens"), lines)


def _hosts(rows: Rows) -> Figure | None:
    """The own time of the median host and of the slowest one of the last rows."""
    found = _with(rows, "host_data_seconds")
    if not found:
        return None
    n_hosts = len(found[-1]["host_data_seconds"])
    found = [row for row in found if len(row["host_data_seconds"]) == n_hosts]
    own_SH = np.array([row["host_data_seconds"] for row in found])
    own_SH = own_SH + np.array([row["host_work_seconds"] for row in found])
    slowest = int(np.median(own_SH[-RECENT:], axis=0).argmax())
    lines = {f"host {slowest}": (own_SH[:, slowest], RED)} if n_hosts > 1 else {}
    lines[f"median of {n_hosts}"] = (np.median(own_SH, axis=1), BLUE)
    return _seconds(_column(found, "tokens"), lines)


PICTURES: dict[str, LivePicture] = {
    "loss": LivePicture(
        "Loss", "Smoothed, in a band of the highest and lowest; dots are held-out text.", _loss
    ),
    "speed": LivePicture(
        "Speed", "Between two rows, without evaluations; MFU is of the machine's peak.", _speed
    ),
    "steps": LivePicture(
        "Time of a step",
        "Median, and what 5 and 1 of 100 steps take longer than, of the last 1000; with"
        " checkpoints, without evaluations.",
        _steps,
    ),
    "hosts": LivePicture(
        "Own time of the hosts",
        "For data, and what else a host does between two steps but saving; of several the slowest"
        " of the last rows beside the median.",
        _hosts,
    ),
    "load": LivePicture(
        "Load of the experts",
        f"Assignments over the layer's mean, in the last {RECENT} logged steps: white is a fair"
        " share, orange too much, purple too little.",
        _load,
    ),
    "maxvio": LivePicture(
        "Balance",
        "How far the fullest expert of a layer is above its fair share: 0 is balance. The mean of"
        " the layers, in a band from the lowest to the highest.",
        _violations,
    ),
    "drops": LivePicture(
        "Dropped",
        "Assignments that no expert computed: the mean of the layers, in a band from the lowest to"
        " the highest.",
        _drops,
    ),
    "gradient": LivePicture(
        "Gradient and rate", "The norm is of the whole gradient, before clipping.", _gradient
    ),
}


def _with(rows: Rows, key: str) -> Rows:
    return [row for row in rows if key in row and "tokens" in row]


def _column(rows: Rows, key: str) -> np.ndarray:
    return np.array([row[key] for row in rows], np.float64)


def _stretches(
    x_S: np.ndarray, y_S: np.ndarray, take: Callable[..., Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The last x of each stretch, and what is taken of its y, both (X,)."""
    parts = np.array_split(np.arange(len(x_S)), min(len(x_S), STRETCHES))
    return np.array([x_S[p[-1]] for p in parts]), np.array([take(y_S[p], axis=0) for p in parts])


def _band(ax: Axes, x_S: np.ndarray, y_S: np.ndarray, colour: str) -> None:
    x, low = _stretches(x_S, y_S, np.min)
    _, high = _stretches(x_S, y_S, np.max)
    if len(x) < len(x_S):
        ax.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
    else:
        ax.plot(x, y_S, color=colour, alpha=0.4, lw=0.7)


def _line(ax: Axes, rows: Rows, key: str, colour: str) -> None:
    """A measure over the tokens, as a line in its band."""
    if not rows:
        return
    x, y = _column(rows, "tokens"), _column(rows, key)
    _band(ax, x, y, colour)
    ax.plot(*_stretches(x, y, np.mean), color=colour)


def _seconds(x_S: np.ndarray, lines: dict[str, tuple[np.ndarray, str]]) -> Figure:
    """Seconds a step over the tokens: lines by their names, each with its colour."""
    figure, ax = axes(left=0.17, right=0.96)
    for name, (y_S, colour) in lines.items():
        ax.plot(*_stretches(x_S, y_S, np.mean), color=colour, label=name)
    ax.legend(frameon=False, loc="upper right", ncols=len(lines))
    ax.set_ylim(0, 1.2 * ax.get_ylim()[1])
    ax.set_ylabel("seconds a step")
    token_axis(ax)
    return figure


def _panels(n: int) -> tuple[Figure, list[Axes]]:
    """Panels one below the other, with one axis of tokens."""
    figure = Figure(figsize=(WIDTH, 3.1))
    column = figure.subplots(n, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(0.17, 0.46 / 3.1, 0.96, 1 - 0.1 / 3.1, hspace=0.14)
    return figure, list(column)


def _over_layers(rows: Rows, key: str, label: str) -> Figure | None:
    """The mean of the layers, in a band from the lowest layer to the highest."""
    if not rows:
        return None
    figure, ax = axes(left=0.2, right=0.96)
    # Multi-token prediction, in some stages only, has layers of its own: rows differ in length.
    of_layers = {
        name: np.array([take(row[key]) for row in rows], np.float64)
        for name, take in (("low", np.min), ("mean", np.mean), ("high", np.max))
    }
    x_S = _column(rows, "tokens")
    x, low = _stretches(x_S, of_layers["low"], np.mean)
    _, high = _stretches(x_S, of_layers["high"], np.mean)
    ax.fill_between(x, low, high, color=BLUE, alpha=0.25, lw=0)
    ax.plot(*_stretches(x_S, of_layers["mean"], np.mean), color=BLUE)
    ax.set_ylim(bottom=0)
    ax.set_ylabel(label)
    token_axis(ax)
    return figure
