"""Another order of the routed experts of each layer: a model that computes the same.

Expert weights and biases, router rows, loss-free bias and tables of expert ids change places
together.  The outputs change by rounding at most: sums over experts add up in another order.

Shapes: L MoE layers of a stack, E routed experts, then Z identity experts, which stay in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import Config, ModelConfig, replace
from dsmoe_jax.config.checks import require
from dsmoe_jax.model import layout
from dsmoe_jax.moe import dropping
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.parallel.sharding import parameter_name

Tree = TypeVar("Tree")


def check(config: ModelConfig) -> None:
    """Refuses a model that an order of its experts would change.

    Raises:
      ValueError: naming the key.
    """
    moe = config.moe
    e = moe.n_routed_experts
    require(e > 0, "model.moe.n_routed_experts", e, "a dense model has no experts to order")
    router, _ = get_router(moe)
    moves = router.learned or bool(id_tables(config))
    want = "chooses experts by their number: in another order it is another router"
    require(moves, "model.moe.router.name", moe.router.name, want)
    want = "replays a recording, whose experts have the order of the recorded model"
    require(not router.needs_recording, "model.moe.router.name", moe.router.name, want)


def whole_parts(config: ModelConfig) -> dict[str, int]:
    """Equal parts of the experts that must stay together, by the key that asks for it.

    Groups of group-limited routing, and the devices that have a capacity; the fewest parts first.
    """
    moe = config.moe
    parts = {"model.moe.router.n_group": moe.router.n_group}
    drops = [drop for drop in (moe.drop, moe.evaluation_drop) if drop is not None]
    if any(dropping.POLICIES[drop.policy].by_device for drop in drops):
        parts["model.moe.expert_groups"] = moe.expert_groups
    some = {key: n for key, n in parts.items() if n > 1}
    return dict(sorted(some.items(), key=lambda item: item[1]))


def permuted(config: ModelConfig, tree: Tree, orders: Sequence[np.ndarray]) -> Tree:
    """The arrays of a model, or moments named as they are, with the experts in another order.

    Args:
      config: of the model.
      tree: a `ModelState`, or an optimizer's state; of arrays in devices or of numpy's.
      orders: for every MoE layer in the order of reports, those of multi-token prediction last: the
        expert that each place gets, int (E,).
    """

    def change(name: str, x: jax.Array, orders: Sequence[np.ndarray]) -> jax.Array:
        return _change(config, name, x, np.stack(orders))

    return mapped(config, tree, orders, change)


def mapped(
    config: ModelConfig,
    tree: Tree,
    of_layers: Sequence[Any],
    change: Callable[[str, jax.Array, Sequence[Any]], jax.Array],
) -> Tree:
    """The arrays of a model, or moments named as they are, with those of the MoE layers changed.

    Args:
      config: of the model.
      tree: as for `permuted`.
      of_layers: something for every MoE layer, those of multi-token prediction last.
      change: `(name, array, of its layers) -> array`; the array has a leading layer axis.
    """
    by_stack: dict[layout.Path, Sequence[Any]] = {}
    rest = list(of_layers)
    for stack, n in layout.moe_stacks(config):
        by_stack[stack] = rest[:n]
        del rest[:n]
    assert not rest, "one for every MoE layer"

    def one(path: tuple, x: jax.Array) -> jax.Array:
        keys = layout.keys_of(path)
        for stack, own in by_stack.items():
            if keys[: len(stack)] == stack and keys[len(stack)] == "moe":
                return change(parameter_name(path) or "", x, own)
        return x

    return jax.tree.map_with_path(one, tree)


def permuted_load(load_LE: np.ndarray, orders: Sequence[np.ndarray]) -> np.ndarray:
    """Loads of the experts in the new order; columns behind them stay."""
    order_LE = np.stack(list(orders))
    e = order_LE.shape[1]
    moved_LE = np.take_along_axis(load_LE[:, :e], order_LE, axis=1)
    return np.concatenate([moved_LE, load_LE[:, e:]], axis=1)


def permuted_config(config: Config, orders: Sequence[np.ndarray]) -> Config:
    """The config of a run, with the ids of trained experts in the new order."""
    chosen = config.train.trainable.experts
    if chosen is None:
        return config
    places = [np.argsort(order) for order in orders]
    experts = tuple(
        tuple(sorted(int(place[i]) for i in ids)) for ids, place in zip(chosen, places, strict=True)
    )
    trainable = {"experts": experts, "most_used_in": None}
    return replace(config, **{f"train.trainable.{key}": x for key, x in trainable.items()})


def _change(config: ModelConfig, name: str, x: jax.Array, order_LE: np.ndarray) -> jax.Array:
    """One array of stacked layers; of an optimizer's state, too."""
    if name in id_tables(config):
        return _renamed(x, order_LE)
    if not name.rpartition("_")[2].startswith("E"):
        return x
    moe = config.moe
    n = x.shape[1]
    if n != moe.n_routed_experts:
        order_LE = _rows(config, order_LE, n // moe.n_choices)
    changed = x[np.arange(len(order_LE))[:, None], order_LE]
    return jax.device_put(changed, x.sharding) if isinstance(x, jax.Array) else changed


def _rows(config: ModelConfig, order_LE: np.ndarray, rows: int) -> np.ndarray:
    """The order of a router's rows: identity experts too, several rows for each."""
    n = config.moe.n_choices
    behind_Z = np.arange(config.moe.n_routed_experts, n)
    order_LE = np.concatenate([order_LE, np.tile(behind_Z, (len(order_LE), 1))], axis=1)
    row_R = np.arange(rows)
    if get_router(config.moe)[0].interleaved:
        return (order_LE[:, :, None] * rows + row_R).reshape(len(order_LE), -1)
    return (order_LE[:, None, :] + row_R[:, None] * n).reshape(len(order_LE), -1)


def _renamed(ids: jax.Array, order_LE: np.ndarray) -> jax.Array:
    """Ids of experts by their new places, (L, ...); what is no routed expert stays."""
    e = order_LE.shape[1]
    place_LE = np.argsort(order_LE, axis=1).astype(ids.dtype)
    layer = np.arange(len(ids)).reshape(-1, *[1] * (ids.ndim - 1))
    return jnp.where(ids < e, jnp.asarray(place_LE)[layer, jnp.minimum(ids, e - 1)], ids)


def id_tables(config: ModelConfig) -> set[str]:
    """Names of the router's variables that hold ids of experts."""
    router, settings = get_router(config.moe)
    if router.state is None or not router.state.holds_ids:
        return set()
    return set(router.state.first(dataclasses.replace(settings, vocab_size=1)))
