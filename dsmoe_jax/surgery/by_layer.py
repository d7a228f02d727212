"""The parameters of a model layer by layer, and back into the stacks that another layout has.

Which layers have an MoE layer decides in which stacks all layers lie (model/layout.py).  So a model
is taken apart before that changes, and put together afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import layout
from dsmoe_jax.model.layout import Place
from dsmoe_jax.parallel import sharding

Arrays = dict[layout.Path, np.ndarray]  # by their path in a layer, or in the model


class Apart(NamedTuple):
    """Parameters layer by layer, or moments of them.

    Attributes:
      layers: of the layers in order, and behind them those of multi-token prediction.
      rest: all others.
    """

    layers: list[Arrays]
    rest: Arrays


def places(config: ModelConfig) -> list[Place]:
    """The places of all layers in order, and behind them those of multi-token prediction."""
    modules = [Place(("mtp", "block"), module) for module in range(config.mtp_depth)]
    return [*layout.places(config), *modules]


def by_path(tree: Any) -> Arrays:
    """The arrays of a tree of parameters by their path."""
    return {layout.keys_of(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def apart(config: ModelConfig, arrays: Arrays) -> Apart:
    """Takes parameters apart.

    Args:
      config: of the model.
      arrays: all of them, or some.
    """
    layers = []
    rest = dict(arrays)
    for place in places(config):
        depth = len(place.path)
        own = {keys: x for keys, x in arrays.items() if keys[:depth] == place.path}
        if place.index is not None:
            own = {keys: x[place.index] for keys, x in own.items()}
        layers.append({keys[depth:]: x for keys, x in own.items()})
        rest = {keys: x for keys, x in rest.items() if keys[:depth] != place.path}
    return Apart(layers, rest)


def joined(config: ModelConfig, parts: Apart) -> Arrays:
    """Puts parameters together.

    Args:
      config: of the model that they are of now.
      parts: its layers and the rest.
    """
    arrays = dict(parts.rest)
    stacks: dict[layout.Path, list[Arrays]] = {}
    for place, layer in zip(places(config), parts.layers, strict=True):
        if place.index is None:
            arrays |= {(*place.path, *keys): x for keys, x in layer.items()}
        else:
            stacks.setdefault(place.path, []).append(layer)
    for path, layers in stacks.items():
        for keys in layers[0]:
            arrays[(*path, *keys)] = np.stack([layer[keys] for layer in layers])
    return arrays


def filled(shapes: Any, arrays: Arrays) -> Any:
    """A tree of parameters with these arrays, on the ambient mesh if there is one."""
    values = jax.tree.map_with_path(lambda path, _: arrays[layout.keys_of(path)], shapes)
    return jax.device_put(values, sharding.shardings(shapes))


def filled_moments(shapes: Any, state: Any, change: Callable[[Arrays], Arrays]) -> Any:
    """An optimizer's state, its moments changed as parameters are.

    Args:
      shapes: of the new state.
      state: the old one; its moments lie in trees of the parameters, beside counters.
      change: of the arrays of one such tree.
    """
    trees: dict[str, Arrays] = {}
    for path, x in jax.tree.leaves_with_path(state):
        trees.setdefault(_tree_of(path), {})[layout.keys_of(path)] = np.asarray(x)
    after = {name: x if () in x else change(x) for name, x in trees.items()}
    values = jax.tree.map_with_path(
        lambda path, _: after[_tree_of(path)][layout.keys_of(path)], shapes
    )
    return jax.device_put(values, sharding.shardings(shapes))


def _tree_of(path: tuple) -> str:
    """The part of a path that leads to a tree of parameters, or to a counter."""
    n = next((i for i, key in enumerate(path) if hasattr(key, "key")), len(path))
    return jax.tree_util.keystr(path[:n])
