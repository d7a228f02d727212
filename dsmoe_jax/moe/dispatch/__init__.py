"""Dispatch, the second seam: moves token rows to their experts and brings the results back.

`types` says what a dispatcher is; read `local` next, which groups rows by expert on one device;
`expert_parallel` moves them between devices, by `exchange`.  `volume` counts what travels.
moe/routed.py puts dispatch, experts and combine together; moe/blocks.py is what it does with the
rows that arrive on a device of a mesh.

A new dispatcher is two functions and a line in `DISPATCHERS`.
"""

from __future__ import annotations

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.moe.dispatch import expert_parallel, local
from dsmoe_jax.moe.dispatch import volume as volumes
from dsmoe_jax.moe.dispatch.types import Arrived, Dispatcher, DispatchReport, Grouped
from dsmoe_jax.moe.dispatch.volume import Volume

__all__ = [
    "DISPATCHERS",
    "Arrived",
    "DispatchReport",
    "Dispatcher",
    "Grouped",
    "Volume",
    "check_dispatcher",
    "choose_dispatcher",
    "choose_name",
    "volume",
]

# The dispatchers that "auto" chooses.
ON_ONE_DEVICE = "local"
ON_A_MESH = "all_to_all"

DISPATCHERS: dict[str, Dispatcher] = {
    "local": Dispatcher(
        local.stay,
        local.back,
        volumes.on_one_chip,
        needs_mesh=False,
        splits_experts=False,
    ),
    "all_to_all": Dispatcher(
        expert_parallel.all_to_all, expert_parallel.combine_all_to_all, volumes.of_all_to_all
    ),
    "fixed_slots": Dispatcher(
        expert_parallel.fixed_slots,
        expert_parallel.combine_fixed_slots,
        volumes.of_fixed_slots,
        drops_by_shard=True,
    ),
    "all_gather": Dispatcher(
        expert_parallel.all_gather, expert_parallel.combine_all_gather, volumes.of_all_gather
    ),
}


def choose_dispatcher(name: str, n_devices: int) -> Dispatcher:
    """The dispatcher of `model.moe.dispatch.name` for experts on that many devices."""
    return DISPATCHERS[choose_name(name, n_devices)]


def choose_name(name: str, n_devices: int) -> str:
    """The name of that dispatcher, which is another one than `name` for "auto"."""
    if name != "auto":
        return name
    return ON_ONE_DEVICE if n_devices == 1 else ON_A_MESH


def check_dispatcher(moe: MoEConfig) -> None:
    """Refuses an unknown dispatcher.

    Raises:
      ValueError: naming the key, with what would be right.
    """
    name = moe.dispatch.name
    key = "model.moe.dispatch.name"
    names = ["auto", *sorted(DISPATCHERS)]
    require(name in names, key, name, f"must be one of {names}")


def check_mesh(name: str, n_devices: int, *, has_mesh: bool) -> None:
    """Refuses a dispatcher that the mesh, or its absence, does not allow.

    Args:
      name: of `model.moe.dispatch.name`.
      n_devices: over which the mesh splits the experts.
      has_mesh: whether there is one.

    Raises:
      ValueError: naming the key, with what would be right.
    """
    if name == "auto":
        return
    key = "model.moe.dispatch.name"
    if not DISPATCHERS[name].splits_experts and n_devices > 1:
        others = sorted({"auto", *(n for n, d in DISPATCHERS.items() if d.splits_experts)})
        want = f"the mesh splits the experts over expert={n_devices} devices"
        raise ValueError(f"{key}={name!r}: {want}; must be one of {others}")
    if DISPATCHERS[name].needs_mesh and not has_mesh:
        raise ValueError(f"{key}={name!r}: there is no mesh; must be 'auto' or 'local'")


def volume(moe: MoEConfig, t: int, p: int) -> Volume:
    """Rows that a config's dispatcher moves and buffers with t tokens a chip on p chips."""
    if p == 1 or not moe.n_routed_experts:
        return volumes.on_one_chip(moe, t, p)
    return choose_dispatcher(moe.dispatch.name, p).volume(moe, t, p)
