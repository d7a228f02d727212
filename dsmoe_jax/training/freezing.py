"""Which parameters a run trains, and which it keeps to the last bit (`train.trainable`).

    all             everything
    dense_part      all but routed experts and router (ST-MoE, 2202.08906, fine-tunes it alone and
                    finds about the same quality)
    experts         the routed experts alone, all of them
    chosen_experts  some routed experts of each layer (ESFT 2407.01906: those that the task uses)

Frozen parameters are no argument of the loss's gradient: nothing is computed, accumulated or kept
in the optimizer for them, weight decay does not reach them, and the norm that is clipped and logged
is of the others.  Of chosen experts the arrays are trained as a whole, but the gradient of the
other experts is 0 and their values are put back after the update; their moments stay 0.  A router
whose parameters are frozen keeps its bias too.

Shapes: L MoE layers, those of multi-token prediction last; E routed experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import Config, TrainableConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.model import layout
from dsmoe_jax.model.build import model_shapes
from dsmoe_jax.parallel.sharding import parameter_name

_KEY = "train.trainable."


class NoLoad(ValueError):
    """A layer whose experts a text does not use."""


class Part(NamedTuple):
    """A registry line.

    Attributes:
      routed, router, rest: whether the routed experts, the router and all else are trained.
      chosen: whether only those experts are whose ids the config has.
    """

    routed: bool
    router: bool
    rest: bool
    chosen: bool = False


PARTS: dict[str, Part] = {
    "all": Part(routed=True, router=True, rest=True),
    "dense_part": Part(routed=False, router=False, rest=True),
    "experts": Part(routed=True, router=False, rest=False),
    "chosen_experts": Part(routed=True, router=False, rest=False, chosen=True),
}


def get_part(trainable: TrainableConfig) -> Part:
    """The registry line of a config.

    Raises:
      ValueError: for an unknown name.
    """
    known = ", ".join(PARTS)
    require(trainable.part in PARTS, f"{_KEY}part", trainable.part, f"must be one of {known}")
    return PARTS[trainable.part]


def check(config: Config) -> None:
    """Refuses a part that the model does not have, and ids that do not fit it.

    Raises:
      ValueError: naming the key.
    """
    trainable = config.train.trainable
    part = get_part(trainable)
    params = model_shapes(config.model).params
    routed = any(_is_routed(path) for path, _ in jax.tree.leaves_with_path(params))
    trains_some = part.rest or routed
    require(trains_some, f"{_KEY}part", trainable.part, "the model has no routed experts")
    if not part.chosen:
        for name in ("experts", "most_used_in"):
            value = getattr(trainable, name)
            fits = f"chooses nothing, for part={trainable.part!r} it must be None"
            require(value is None, _KEY + name, value, fits)
        return
    ids = trainable.experts
    wanted = "must be ids by layer; or name results of evaluate --out in most_used_in"
    require(ids is not None, f"{_KEY}experts", ids, wanted)
    assert ids is not None
    n_experts = config.model.moe.n_routed_experts
    n_layers = sum(n for _, n in layout.moe_stacks(config.model))
    require(len(ids) == n_layers, f"{_KEY}experts", ids, f"must be of {n_layers} MoE layers")
    known = all(len(set(layer)) == len(layer) for layer in ids)
    known &= all(0 <= i < n_experts for layer in ids for i in layer)
    require(known, f"{_KEY}experts", ids, f"must be different ids from 0 to {n_experts - 1}")
    require(any(ids), f"{_KEY}experts", ids, "must name an expert")


class Freezing:
    """The trained parameters of a config, as functions for the training step."""

    def __init__(self, config: Config):
        check(config)
        self._part = get_part(config.train.trainable)
        self._chosen = _chosen(config) if self._part.chosen else None

    @property
    def moves_router(self) -> bool:
        """Whether the router's variables, its bias, are moved."""
        return self._part.router

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """The parameters that are trained, and the others."""
        trained, frozen = nnx.split_state(params, self._is_trained, ...)
        return trained, frozen

    def gradient(self, grads: nnx.State) -> nnx.State:
        """The gradient of the trained parameters, 0 for experts that are not chosen."""
        return self._of_chosen(grads, jax.tree.map(jnp.zeros_like, grads))

    def updated(self, params: nnx.State, before: nnx.State) -> nnx.State:
        """The trained parameters after an update, as before for experts that are not chosen."""
        return self._of_chosen(params, before)

    def _of_chosen(self, chosen: nnx.State, others: nnx.State) -> nnx.State:
        if self._chosen is None:
            return chosen
        by_stack = self._chosen

        def pick(path: tuple, x: jax.Array, other: jax.Array) -> jax.Array:
            keys = layout.keys_of(path)
            (mask_LE,) = (m for stack, m in by_stack.items() if keys[: len(stack)] == stack)
            return jnp.where(jnp.expand_dims(mask_LE, range(2, x.ndim)), x, other)

        return jax.tree.map_with_path(pick, chosen, others)

    def _is_trained(self, path: tuple, variable: Any) -> bool:
        del variable
        if _is_routed(path):
            return self._part.routed
        return self._part.router if _is_router(path) else self._part.rest


def _chosen(config: Config) -> dict[layout.Path, np.ndarray]:
    """Whether each expert is chosen, bool (L, E), by the path of its stack of layers."""
    layers = iter(config.train.trainable.experts or ())
    found = {}
    for stack, n in layout.moe_stacks(config.model):
        found[stack] = np.zeros((n, config.model.moe.n_routed_experts), bool)
        for mask_E in found[stack]:
            mask_E[list(next(layers))] = True
    return found


def _is_routed(path: tuple) -> bool:
    """Whether a parameter is of the routed experts: it has the axis E, and is no router's."""
    return "E" in _axes(path) and not _is_router(path)


def _is_router(path: tuple) -> bool:
    """Whether a parameter is of a router: it is named so."""
    return (parameter_name(path) or "").startswith("router_")


def _axes(path: tuple) -> str:
    return (parameter_name(path) or "").rpartition("_")[2]


def most_used(load_LE: Any, share: float) -> tuple[tuple[int, ...], ...]:
    """In each layer the fewest experts whose share of the load reaches `share`, by id.

    Choosing by the share of a task's tokens is ESFT-Token of 2407.01906.

    Args:
      load_LE: assignments of a task's text to each expert.
      share: of each layer's assignments, above 0.

    Raises:
      NoLoad: for a layer without load.
    """
    chosen = []
    for layer, load_E in enumerate(np.asarray(load_LE, np.float64)):
        if not load_E.sum():
            raise NoLoad(f"layer {layer} has no load")
        order_E = np.argsort(-load_E, kind="stable")
        reached_E = np.cumsum(load_E[order_E]) / load_E.sum()
        # The sum of shares may round to just below 1.
        n = 1 + int(np.searchsorted(reached_E, share - 1e-9))
        chosen.append(tuple(sorted(order_E[:n].tolist())))
    return tuple(chosen)
