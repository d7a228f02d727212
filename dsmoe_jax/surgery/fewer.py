"""Fewer routed experts in each layer: what becomes of weights, router rows, biases and tables.

A new expert is a mean of old ones: of one alone where experts are pruned, of several where they are
merged.  The rows of the router and its biases are means in the same shares.  In a table of expert
ids a token of an expert that is gone gets the next best of those that are left.

All layers of a model have equally many experts, and so have the groups of group-limited routing.

Shapes: L MoE layers of a stack, E experts before, N experts after, F expert width; I and O choices
of the router before and after, identity experts included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import Config, ModelConfig, replace
from dsmoe_jax.config.checks import require
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.surgery import permutation
from dsmoe_jax.surgery.likeness import UNIT_AXES

Tree = TypeVar("Tree")


class Layer(NamedTuple):
    """The experts of a layer after an operation.

    Attributes:
      share_NE: shares of the old experts in each new one, rows that sum to 1.
      place_EN: for each old expert all new ones, the best for its tokens first.
      units_EF: the order of each old expert's hidden units that a mean is taken in; None: as given.
    """

    share_NE: np.ndarray
    place_EN: np.ndarray
    units_EF: np.ndarray | None = None


def kept(ids_N: np.ndarray, likeness_EE: np.ndarray) -> Layer:
    """A layer with some of its experts alone.

    Args:
      ids_N: of those, ascending.
      likeness_EE: of each pair; the tokens that a table gives to another expert go to the one that
        is most like it.
    """
    e = len(likeness_EE)
    likeness_EE = likeness_EE.copy()
    np.fill_diagonal(likeness_EE, np.inf)
    place_EN = np.argsort(-likeness_EE[:, ids_N], axis=1, kind="stable")
    return Layer(np.eye(e)[ids_N], place_EN)


def check_number(config: ModelConfig, n: int, why: str) -> None:
    """Refuses a number of experts that the router cannot choose K of.

    Args:
      config: of the model.
      n: experts that would be left in a layer.
      why: the flags that say so, with their values.

    Raises:
      ValueError: with the numbers.
    """
    moe = config.moe
    groups = moe.router.n_group
    k = moe.num_experts_per_tok
    if not k <= n <= moe.n_routed_experts:
        raise ValueError(
            f"{why}: leaves {n} of the {moe.n_routed_experts} experts of a layer; must be at least"
            f" model.moe.num_experts_per_tok={k} and at most all"
        )
    if n % groups:
        raise ValueError(
            f"{why}: leaves {n} experts of a layer; must be a multiple of"
            f" model.moe.router.n_group={groups}"
        )
    mesh = jax.sharding.get_mesh()
    if not mesh.empty and n % mesh.shape["expert"]:
        raise ValueError(
            f"{why}: leaves {n} experts of a layer; must be a multiple of"
            f" mesh.expert={mesh.shape['expert']}"
        )
    reachable = moe.router.topk_group * n // groups
    if reachable < k:
        raise ValueError(
            f"{why}: leaves {n} experts of a layer, of which a token may use"
            f" {reachable} (model.moe.router.topk_group={moe.router.topk_group} of {groups}"
            f" groups); must be at least model.moe.num_experts_per_tok={k}"
        )


def parts(config: ModelConfig) -> np.ndarray:
    """The experts of each group of group-limited routing, which stay equal: (G, E / G)."""
    moe = config.moe
    return np.arange(moe.n_routed_experts).reshape(moe.router.n_group, -1)


def reduced(config: ModelConfig, tree: Tree, layers: Sequence[Layer]) -> Tree:
    """The arrays of a model, or moments named as they are, with fewer experts.

    Args:
      config: of the model before.
      tree: a `ModelState`, or an optimizer's state; of arrays in devices or of numpy's.
      layers: all MoE layers, those of multi-token prediction last.
    """

    def change(name: str, x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
        return _change(config, name, x, layers)

    return permutation.mapped(config, tree, layers, change)


def reduced_load(load_LE: np.ndarray, layers: Sequence[Layer]) -> np.ndarray:
    """Loads of the new experts, sums of those that they are made of; columns behind them stay.

    The load of pruned experts is gone.
    """
    found = []
    for load_E, layer in zip(load_LE, layers, strict=True):
        e = layer.share_NE.shape[1]
        made_of_NE = layer.share_NE > 0
        found.append(np.concatenate([made_of_NE @ load_E[:e], load_E[e:]]))
    return np.stack(found)


def reduced_config(config: Config, layers: Sequence[Layer]) -> Config:
    """The config of the run with fewer experts, with the ids of trained ones that are left.

    Raises:
      ValueError: if trained experts are chosen and none of them is left.
    """
    changed: dict[str, object] = {"model.moe.n_routed_experts": len(layers[0].share_NE)}
    chosen = config.train.trainable.experts
    if chosen is not None:
        key = "train.trainable.experts"
        left = tuple(
            tuple(sorted({int(n) for i in ids for n in np.flatnonzero(layer.share_NE[:, i])}))
            for ids, layer in zip(chosen, layers, strict=True)
        )
        require(any(left), key, chosen, "none of these is left; must be None to operate on it")
        changed |= {key: left, "train.trainable.most_used_in": None}
    return replace(config, **changed)


def _change(config: ModelConfig, name: str, x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    """One array of stacked layers; of an optimizer's state, too."""
    if name in permutation.id_tables(config):
        moved = np.stack(
            [_renamed(np.asarray(ids), layer) for ids, layer in zip(x, layers, strict=True)]
        )
        return jnp.asarray(moved)
    if not name.rpartition("_")[2].startswith("E"):
        return x
    shares = [_share(config, layer.share_NE, x.shape[1]) for layer in layers]
    if all((share == 1).sum() == len(share) for share in shares):
        order_LO = np.stack([share_OI.argmax(axis=1) for share_OI in shares])
        return _placed(x[np.arange(len(x))[:, None], order_LO], x)
    axis = UNIT_AXES.get(name)
    made = []
    for x_E, share_OI, layer in zip(x, shares, layers, strict=True):
        if axis is not None and layer.units_EF is not None:
            x_E = _in_order(x_E, layer.units_EF, axis)
        made.append(_mean(x_E, share_OI))
    return _placed(jnp.stack(made), x)


def _placed(changed: jax.Array, x: jax.Array) -> jax.Array:
    """A changed array on the devices that the given one is on."""
    return jax.device_put(changed, x.sharding) if isinstance(x, jax.Array) else changed


def _share(config: ModelConfig, share_NE: np.ndarray, rows: int) -> np.ndarray:
    """Shares of old rows in new ones: identity experts keep theirs, an expert may have several."""
    if rows == share_NE.shape[1]:
        return share_NE
    n_identity = config.moe.n_identity_experts
    n, e = share_NE.shape
    share_OI = np.zeros((n + n_identity, e + n_identity))
    share_OI[:n, :e] = share_NE
    share_OI[n:, e:] = np.eye(n_identity)
    each = np.eye(rows // config.moe.n_choices)
    if get_router(config.moe)[0].interleaved:
        return np.kron(share_OI, each)
    return np.kron(each, share_OI)


def _in_order(x_E: jax.Array, units_EF: np.ndarray, axis: int) -> jax.Array:
    """An array of all experts, the hidden units of each in its order."""
    others = [i for i in range(x_E.ndim) if i not in (0, axis)]
    return jnp.take_along_axis(jnp.asarray(x_E), np.expand_dims(units_EF, others), axis)


def _mean(x_E: jax.Array, share_OI: np.ndarray) -> jax.Array:
    """Means of the arrays of old experts."""
    # At highest precision: an accelerator's default would round the weights to bfloat16.
    return jnp.einsum("oi,i...->o...", share_OI.astype(np.float32), x_E, precision="highest")


def _renamed(ids: np.ndarray, layer: Layer) -> np.ndarray:
    """Ids of a table, (V,) or (V, K), by their new places; the K of a token stay different."""
    n, e = layer.share_NE.shape
    columns = ids.reshape(len(ids), -1)
    taken_VN = np.zeros((len(ids), n), bool)
    found = np.empty_like(columns)
    # First those that are not gone: an expert that is left keeps its tokens.
    best_VK = layer.place_EN[np.minimum(columns, e - 1), 0]
    stays_VK = (columns < e) & (layer.share_NE[best_VK, np.minimum(columns, e - 1)] > 0)
    for pass_VK in (stays_VK, ~stays_VK):
        for k in range(columns.shape[1]):
            rows = np.flatnonzero(pass_VK[:, k] & (columns[:, k] < e))
            ranked_RN = layer.place_EN[columns[rows, k]]
            free_RN = ~np.take_along_axis(taken_VN[rows], ranked_RN, axis=1)
            chosen = ranked_RN[np.arange(len(rows)), free_RN.argmax(axis=1)]
            found[rows, k] = chosen
            taken_VN[rows, chosen] = True
    # Identity experts and "unassigned" come behind the experts.
    return np.where(columns < e, found, columns - (e - n)).reshape(ids.shape).astype(ids.dtype)
