"""The page of `python -m dsmoe_jax analyse`: what the experts of one or more models learned.

Shapes: L MoE layers, E routed experts, G domains, P ranges of positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.report.blocks import Block, Code, Heading, Picture, Pictures, Table, Text
from dsmoe_jax.report.load_maps import LoadMap, order_by_domain, stacked
from dsmoe_jax.report.numbers import NONE, fixed
from dsmoe_jax.report.style import WIDTH, styled

Tables = Mapping[str, Any]
MAX_STEPS = 8  # earlier steps in a table, spread like that too
MAX_MAPS = 6  # layers of which maps are drawn: spread evenly from the first to the last


def blocks(
    runs: Mapping[str, Tables],
    command: str,
    explorers: Mapping[str, str],
    side_by_side: str | None = None,
) -> list[Block]:
    """The blocks of the page.

    Args:
      runs: results of `analysis.tables.compute`, by name of the run.
      command: that makes the page again.
      explorers: file of each run's explorer, by name of the run.
      side_by_side: file of the explorer of all; None for a single run.
    """
    found: list[Block] = [
        Text(_SUMMARY),
        _table(runs, _overview),
        Text(_SUMMARY_NOTE, "note"),
    ]
    if side_by_side is not None:
        found.append(Text(f"All on the same text, coloured by expert: `{side_by_side}`."))
    with styled():
        drawn = {name: pictures(name, tables) for name, tables in runs.items()}
    for name, tables in runs.items():
        found += [Heading(name), Text(f"Text coloured by expert: `{explorers[name]}`.")]
        found += [
            by_layer(tables),
            *_doubles(tables),
            *_saturation(tables),
            Pictures(drawn[name]),
        ]
    return [*found, Heading("How to repeat it"), Code(command)]


_SUMMARY = (
    "Experts of each model on the same held-out text, mean over its MoE layers. **Domain** and"
    " **vocabulary** say how far the domain, or the token alone, decides the experts; a"
    " **committee** is the smallest set of experts with half of the sum of all gates."
)
_SUMMARY_NOTE = (
    "Domain specialisation: 0 if all domains use the same experts, 1 if every expert serves one."
    " Vocabulary specialisation: the largest share of one expert in the occurrences of a token,"
    " mean over tokens. Effective experts: exp of the entropy of a token's gates. Overlap: Jaccard"
    " index of two domains' committees, mean over pairs; by chance: of sets of the same sizes drawn"
    " at random. Alike: mean cosine of two experts' outputs on the same tokens."
)


def _overview(tables: Tables) -> dict[str, str]:
    layers = tables["committees"]["layers"]
    return {
        "MaxVio": _mean(tables["load"]["maxvio"], 2),
        "domain": _mean(tables["domains"]["domain_specialisation"], 3),
        "vocabulary": _mean(tables["vocabulary"]["vocabulary_specialisation"], 3),
        "effective experts": _mean(tables["experts_per_token"]["mean"], 2),
        "committee": _percent([layer["share_of_experts"] for layer in layers]),
        "overlap": _mean([layer["overlap"] for layer in layers], 2),
        "by chance": _mean([layer["chance_overlap"] for layer in layers], 2),
        "alike": _mean(_outputs_alike(tables), 3),
    }


def _table(runs: Mapping[str, Tables], row: Any) -> Table:
    rows = {name: row(tables) for name, tables in runs.items()}
    head = list(next(iter(rows.values())))
    return Table(["", *head], [[name, *cells.values()] for name, cells in rows.items()])


def by_layer(tables: Tables) -> Table:
    """The overview of one run, a row for each layer."""
    committees = tables["committees"]["layers"]
    domain_L = tables["domains"]["domain_specialisation"] or [None] * len(committees)
    alike_L = _outputs_alike(tables) or [None] * len(committees)
    rows = []
    for i, layer in enumerate(committees):
        rows.append(
            [
                f"layer {i + 1}",
                fixed(tables["load"]["maxvio"][i], 2),
                str(tables["load"]["dead_experts"][i]),
                _number(domain_L[i], 3),
                _number(tables["vocabulary"]["vocabulary_specialisation"][i], 3),
                fixed(tables["experts_per_token"]["mean"][i], 2),
                str(len(layer["members"])),
                _count(layer["in_every_domain"]),
                _number(layer["overlap"], 2),
                _number(layer["chance_overlap"], 2),
                _number(alike_L[i], 3),
            ]
        )
    head = ["", "MaxVio", "dead", "domain", "vocabulary", "effective experts", "committee"]
    return Table([*head, "in every domain", "overlap", "by chance", "alike"], rows)


def _doubles(tables: Tables) -> list[Block]:
    """Pairs of experts above the threshold of similarity, in words."""
    if "similarity" not in tables:
        return []
    found = tables["similarity"]
    pairs = [len(layer["alike_in_outputs"]) for layer in found["layers"]]
    threshold = found["threshold"]
    if not any(pairs):
        return [Text(f"No two experts of a layer have outputs more alike than {threshold}.")]
    listed = ", ".join(f"{n} in layer {i}" for i, n in enumerate(pairs, start=1) if n)
    return [Text(f"Pairs of experts with outputs more alike than {threshold}: {listed}.")]


def _outputs_alike(tables: Tables) -> list[float | None]:
    layers = tables["similarity"]["layers"] if "similarity" in tables else []
    return [layer["outputs_mean"] for layer in layers]


def pictures(name: str, tables: Tables) -> list[Picture]:
    """Maps of one run: NAME-domains, NAME-positions, NAME-together, and NAME-alike with weights."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    drawn = {
        "domains": ("Load by domain", _DOMAINS, _domain_maps(tables)),
        "positions": ("Load by position", _POSITIONS, _position_maps(tables)),
        "committees": ("Committees that domains share", _SHARED, _committee_maps(tables)),
        "together": ("Chosen together", _TOGETHER, _together_maps(tables)),
        "alike": ("Alike in their outputs", _ALIKE, _similarity_maps(tables)),
    }
    return [
        Picture(f"{slug}-{key}", title, caption, figure)
        for key, (title, caption, figure) in drawn.items()
        if figure is not None
    ]


_DOMAINS = (
    "Load of each routed expert relative to an even load of the domain (1). Experts stand in the"
    " order of the domain that uses each most."
)
_POSITIONS = "Load relative to an even one, by position in the document; ranges double downwards."
_SHARED = (
    "Jaccard index of two domains' committees, from 0 to 1. Rows and columns are the domains with"
    " text enough, in the order of the load by domain."
)
_TOGETHER = (
    "Share of an expert's tokens (row) that another one (column) computes too, relative to the"
    " mean; the diagonal is left out. Experts are in the order of the load by domain."
)
_ALIKE = "Cosine of two experts' outputs on the same tokens, mean over tokens; from -1 to 1."
_SATURATION = (
    "Share of a token's experts that it had at an earlier step too, or has with the shared experts:"
)


def shown_layers(n_layers: int) -> list[int]:
    """Layers of which maps are drawn."""
    return _spread(n_layers, MAX_MAPS)


def _spread(n: int, most: int) -> list[int]:
    """At most so many of n, evenly from the first to the last."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def _order(tables: Tables, layer: int) -> np.ndarray:
    """The experts of a layer in the order of the domain that uses each most."""
    return order_by_domain(_relative(np.array(tables["domains"]["load"])[:, layer]))


def _relative(load_XE: np.ndarray) -> np.ndarray:
    """Each row relative to its mean; 0 for a row without load."""
    mean_X1 = load_XE.mean(axis=1, keepdims=True)
    return np.divide(load_XE, mean_X1, out=np.zeros(load_XE.shape), where=mean_X1 > 0)


def _domain_maps(tables: Tables) -> Figure:
    label = "routed experts, by the domain that uses each most"
    return _maps(tables, tables["domains"]["load"], tables["domains"]["names"], label)


def _position_maps(tables: Tables) -> Figure:
    found = tables["positions"]
    names = [str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in found["ranges"]]
    return _maps(tables, found["load"], names, "routed experts, in the same order")


def _maps(tables: Tables, load: Any, names: Sequence[str], label: str) -> Figure:
    """A load map for each shown layer, from a load of (rows, layers, experts)."""
    load_XLE = np.array(load)
    return stacked(
        [
            LoadMap(
                f"layer {layer + 1}",
                names,
                _relative(load_XLE[:, layer])[:, _order(tables, layer)],
            )
            for layer in shown_layers(load_XLE.shape[1])
        ],
        label,
    )


def _committee_maps(tables: Tables) -> Figure | None:
    committees = tables["committees"]["layers"]
    layers = shown_layers(len(committees))
    maps = [np.array(committees[layer]["overlaps"], float) for layer in layers]
    if not maps or len(maps[0]) < 2:
        return None
    return _squares(maps, layers, "PuOr_r", (-1, 1))


def _together_maps(tables: Tables) -> Figure:
    maps = []
    for layer in shown_layers(len(tables["coactivation"]["share"])):
        order_E = _order(tables, layer)
        share_EE = np.array(tables["coactivation"]["share"][layer])[np.ix_(order_E, order_E)]
        np.fill_diagonal(share_EE, np.nan)
        mean = np.nanmean(share_EE) if len(share_EE) > 1 else 0
        maps.append(share_EE / mean if mean > 0 else share_EE)
    return _squares(maps, shown_layers(len(tables["coactivation"]["share"])), "PuOr_r", (0, 3))


def _similarity_maps(tables: Tables) -> Figure | None:
    if "similarity" not in tables:
        return None
    layers = shown_layers(len(tables["similarity"]["layers"]))
    maps = []
    for layer in layers:
        order_E = _order(tables, layer)
        alike_EE = np.array(tables["similarity"]["layers"][layer]["outputs"])
        maps.append(alike_EE[np.ix_(order_E, order_E)])
    return _squares(maps, layers, "PuOr_r", (-1, 1))


def _squares(
    maps: Sequence[np.ndarray], layers: Sequence[int], colours: str, limits: tuple[float, float]
) -> Figure:
    """Square maps of pairs of experts, three a row, with one colour scale."""
    columns = min(len(maps), 3)
    rows = -(-len(maps) // columns)
    side = 0.86 * WIDTH / columns
    figure = Figure(figsize=(WIDTH, rows * (side + 0.2) + 0.1), dpi=200)
    grid = figure.add_gridspec(
        rows, columns, left=0.02, bottom=0.02, right=0.86, top=0.94, hspace=0.2, wspace=0.06
    )
    cells = None
    for i, (layer, pairs_EE) in enumerate(zip(layers, maps, strict=True)):
        ax = figure.add_subplot(grid[i // columns, i % columns])
        cells = ax.imshow(pairs_EE, cmap=colours, vmin=limits[0], vmax=limits[1])
        ax.set_title(f"layer {layer + 1}", loc="left", pad=3)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    assert cells is not None, "there is a layer"
    bar = figure.colorbar(cells, cax=figure.add_axes((0.89, 0.3, 0.022, 0.5)))
    bar.outline.set_visible(False)  # pyright: ignore
    return figure


def _saturation(tables: Tables) -> list[Block]:
    """Agreement with other routings of the same text; nothing without one."""
    found = tables["saturation"]
    if not found:
        return []
    names = list(found)
    shown = [names[i] for i in _spread(len(names), MAX_STEPS)]
    by_layer = zip(*(found[name] for name in shown), strict=True)
    rows = [
        [f"layer {i}", *(fixed(share, 3) for share in shares)]
        for i, shares in enumerate(by_layer, start=1)
    ]
    return [Text(_SATURATION), Table(["", *shown], rows)]


def _mean(values: Sequence[float | None] | None, digits: int) -> str:
    known = [value for value in values or [] if value is not None]
    return fixed(float(np.mean(known)), digits) if known else _number(None, digits)


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else fixed(value, digits)


def _count(members: Sequence[int] | None) -> str:
    return NONE if members is None else str(len(members))


def _percent(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.0f} %"
