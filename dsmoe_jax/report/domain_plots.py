"""Picture of the load of the experts by domain.

Shapes: G domains, E routed experts.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.report.load_maps import LoadMap, order_by_domain, stacked
from dsmoe_jax.report.names import short
from dsmoe_jax.report.style import colour
from dsmoe_jax.study.histories import DomainLoads
from dsmoe_jax.study.results import Comparison


def domain_load(comparison: Comparison) -> Figure | None:
    """A map for each arm, domains by experts, of its most specialised layer; of the first seed."""
    loads: dict = {}
    for arm in comparison.arms:
        for history in comparison.histories_of(arm).values():
            if history.domain_loads is not None:
                loads.setdefault(arm, history.domain_loads)
    if not loads:
        return None
    maps = []
    for arm, found in loads.items():
        layer = int(found.specialisation_L.argmax())
        name = f"{short(arm.label, 36)}, layer {layer + 1}"
        title = f"{name}: {found.specialisation_L[layer]:.3f}"
        load_GE = in_order(found, layer)
        maps.append(LoadMap(title, found.names, load_GE, colour(comparison, arm)))
    return stacked(maps, "routed experts, by the domain that uses each most")


def in_order(found: DomainLoads, layer: int) -> np.ndarray:
    """Load of a layer, (G, E), the experts in `order_by_domain`."""
    load_GE = found.load_GLE[:, layer]
    return load_GE[:, order_by_domain(load_GE)]
