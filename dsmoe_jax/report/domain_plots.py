"""Picture of the load of the experts by domain.

Shapes: G domains, E routed experts.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.report.load_maps import load_bar, load_map
from dsmoe_jax.report.names import short
from dsmoe_jax.report.style import WIDTH, colour
from dsmoe_jax.study.histories import DomainLoads
from dsmoe_jax.study.results import Comparison

ROW, TITLE, BELOW = 0.125, 0.26, 0.42  # inches: of a domain, above a map, below the last one


def domain_load(comparison: Comparison) -> Figure | None:
    """A map for each arm, domains by experts, of its most specialised layer; of the first seed."""
    loads: dict = {}
    for arm in comparison.arms:
        for history in comparison.histories_of(arm).values():
            if history.domain_loads is not None:
                loads.setdefault(arm, history.domain_loads)
    if not loads:
        return None
    heights = [TITLE + ROW * len(found.names) for found in loads.values()]
    height = sum(heights) + BELOW
    figure = Figure(figsize=(WIDTH, height), dpi=200)
    top = height
    cells = None
    for (arm, found), taken in zip(loads.items(), heights, strict=True):
        top -= taken
        ax = figure.add_axes((0.24, top / height, 0.63, (taken - TITLE) / height))
        layer = int(found.specialisation_L.argmax())
        load_GE = in_order(found, layer)
        n_domains, n_experts = load_GE.shape
        edges = np.arange(n_experts + 1) + 0.5, np.arange(n_domains + 1) + 0.5
        cells = load_map(ax, *edges, load_GE)
        title = f"{short(arm.label, 36)}, layer {layer + 1}: {found.specialisation_L[layer]:.3f}"
        ax.set_title(title, loc="left", color=colour(comparison, arm), pad=3)
        names = [short(name, 16) for name in found.names]
        ax.set_yticks(range(1, n_domains + 1), names, fontsize=7)
        ax.set_xticks([])
    assert cells is not None
    figure.text(0.24, 0.12 / height, "routed experts, by the domain that uses each most")
    load_bar(figure, cells, (0.89, (height - 1.5) / height, 0.022, 1.1 / height))
    return figure


def in_order(found: DomainLoads, layer: int) -> np.ndarray:
    """Load of a layer, (G, E), the experts in the order of the domain that uses each most.

    The experts of one domain stand in the order of its load, the most loaded first.
    """
    load_GE = found.load_GLE[:, layer]
    order_E = np.lexsort((-load_GE.max(axis=0), load_GE.argmax(axis=0)))
    return load_GE[:, order_E]
