"""Tables and picture of docs/latency.md, from the results of `benchmarks.latency`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import harness
from dsmoe_jax.report.style import ARM_COLOURS, INK, WIDTH, styled
from dsmoe_jax.report.svg import standalone_svg

PARTS = {
    "router": "router",
    "exchange": "exchange",
    "experts": "routed experts",
    "shared": "shared experts",
}
START, END = "<!-- tables -->", "<!-- end of the tables -->"

_ROW = 0.155  # inches, of a bar


def tables(report: Mapping[str, Any]) -> str:
    """The machine, times with shares by setting and path, and what the fast paths gain."""
    rows = report["rows"]
    return "\n\n".join(
        [
            machine(report),
            harness.table([times(row) for row in rows]),
            harness.table([gains(row) for row in rows if row["exchange_ratio"] is not None]),
        ]
    )


def machine(report: Mapping[str, Any]) -> str:
    """A sentence about what was measured, and where."""
    rounds = ", ".join(f"{n} with {int(tokens):,}" for tokens, n in report["rounds"].items())
    return (
        f"{report['cpus']} cores, jax {report['jax']}. {report['num_experts_per_tok']} of"
        f" {report['n_routed_experts']} routed experts and {report['n_shared_experts']} shared ones"
        f" of width {report['moe_intermediate_size']}, hidden size {report['hidden_size']},"
        f" {report['dtype']}. Rounds by tokens: {rounds}."
    )


def times(row: Mapping[str, Any]) -> dict[str, str]:
    """A line of the table of times: milliseconds, and the share of the sum of the parts."""
    total = sum(row[f"{part}_ms"] for part in PARTS)
    parts = {
        f"{name}, ms": f"{row[f'{part}_ms']:.3g} ({100 * row[f'{part}_ms'] / total:.0f} %)"
        for part, name in PARTS.items()
    }
    return {
        **setting(row),
        "path": row["path"],
        "rows sent": "-" if row["rows"] is None else f"{row['rows']:.2f}",
        **parts,
        "sum, ms": f"{total:.3g}",
        "layer, ms": f"{row['layer_ms']:.3g}",
        "call, ms": f"{row['call_ms']:.2g}",
    }


def gains(row: Mapping[str, Any]) -> dict[str, str]:
    """A line of the table of ratios: how many times as fast a path is as the plain one."""
    keys = {**PARTS, "layer": "layer"}
    ratios = {name: _times(row.get(f"{part}_ratio")) for part, name in keys.items()}
    return {**setting(row), "path": row["path"], **ratios}


def setting(row: Mapping[str, Any]) -> dict[str, str]:
    """Devices, limit and tokens of a line."""
    return {
        "devices": str(row["devices"]),
        "tokens": f"{row['tokens']:,}",
        "at most on": "-" if row["limit"] is None else str(row["limit"]),
    }


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def renewed(page: str, report: Mapping[str, Any]) -> str:
    """The page with these tables in place of those between its two marks.

    Raises:
      ValueError: if a mark is missing.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"--page: must have the lines {START} and {END}")
    return f"{before}{start}\n\n{tables(report)}\n\n{end}{after}"


def picture(report: Mapping[str, Any]) -> str:
    """Stacked times of the parts as SVG, an axis for each number of tokens."""
    with styled():
        return standalone_svg(draw(report["rows"]))


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of the parts of every setting and path; a mark for the whole layer."""
    panels = list(_panels(rows))
    heights = [0.42 + _ROW * len(panel) for _, panel in panels]
    height = sum(heights) + 0.54
    figure = Figure(figsize=(1.4 * WIDTH, height))
    top = height - 0.28
    for (tokens, panel), taken in zip(panels, heights, strict=True):
        top -= taken
        ax = figure.add_axes((0.27, (top + 0.2) / height, 0.7, _ROW * len(panel) / height))
        _bars(ax, panel)
        ax.set_title(f"{tokens:,} tokens", loc="left", pad=2)
    figure.text(0.27, 0.05 / height, "ms; the black mark is the layer compiled as one")
    for i, (name, colour) in enumerate(zip(PARTS.values(), ARM_COLOURS, strict=False)):
        figure.text(0.02 + 0.2 * i, 1 - 0.16 / height, f"■ {name}", color=colour)
    return figure


def _panels(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        yield tokens, [row for row in rows if row["tokens"] == tokens]


def _bars(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    names = []
    for y, row in enumerate(rows):
        left = 0.0
        for part, colour in zip(PARTS, ARM_COLOURS, strict=False):
            ax.barh(y, row[f"{part}_ms"], left=left, height=0.72, color=colour)
            left += row[f"{part}_ms"]
        ax.plot([row["layer_ms"]] * 2, [y - 0.45, y + 0.45], color=INK)
        limit = "" if row["limit"] is None else f", at most {row['limit']}"
        names.append(f"{row['devices']}: {row['path']}{limit}")
    ax.set_yticks(range(len(rows)), names, fontsize=7)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.grid(visible=False, axis="y")
