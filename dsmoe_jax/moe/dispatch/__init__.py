"""Dispatch: moves token rows to their experts and brings the results back.

A dispatcher owns no parameters and knows neither how experts are chosen nor how they compute.
Read `local` first; `expert_parallel` does the same between devices, by `exchange`, and `on_mesh`
leads from the whole batch to one device's share of it.

A new dispatcher is a function `(x_tD, routing, n_experts, run_experts, max_load) -> (y_tD,
computed_e)`, what one shard of a mesh does, and a line in `DISPATCHERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.dispatch.expert_parallel import all_gather, all_to_all, capacity
from dsmoe_jax.moe.dispatch.local import local
from dsmoe_jax.moe.dispatch.on_mesh import (
    Exchange,
    RunWeights,
    expert_devices,
    on_mesh,
    token_shards,
)
from dsmoe_jax.moe.experts import ExpertWeights
from dsmoe_jax.moe.kernels import native
from dsmoe_jax.moe.types import Routing

__all__ = [
    "DISPATCHERS",
    "Exchange",
    "check_name",
    "dispatch",
    "expert_devices",
    "local",
    "token_shards",
]

DISPATCHERS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "local": local,
    "all_to_all": all_to_all,
    "capacity": capacity,
    "all_gather": all_gather,
}


def dispatch(
    x_TD: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    run_experts: RunWeights,
    config: MoEConfig,
    limit: int | None = None,
) -> tuple[jax.Array, Exchange]:
    """The routed experts' weighted sum, on the ambient mesh (`jax.set_mesh`) if there is one.

    Args:
      x_TD: tokens, in the compute dtype.
      routing: of those tokens.
      weights: of all experts.
      run_experts: computes rows grouped by expert: `(rows_ND, group_sizes_E, weights) -> rows_ND`.
      config: of the layer: its `dispatch`, `buffer_factor` and `exchange_chunks`.
      limit: the most assignments that one shard's tokens have on one device; None: no limit.

    Returns:
      y_TD, and what the dispatch did.

    Raises:
      ValueError: for a dispatcher that the mesh, or its absence, does not allow.
    """
    check_name(config.dispatch)
    mesh, n_devices, name = jax.sharding.get_abstract_mesh(), expert_devices(), config.dispatch
    if name == "auto":
        name = "local" if n_devices == 1 else "all_to_all"
    if name == "local" and n_devices > 1:
        raise ValueError(
            f"model.moe.dispatch.name='local': the mesh splits the experts over expert={n_devices}"
            f" devices; must be one of {sorted({'auto', *DISPATCHERS} - {'local'})}"
        )
    if name != "local" and mesh.empty:
        raise ValueError(
            f"model.moe.dispatch.name={name!r}: there is no mesh; must be 'auto' or 'local'"
        )
    if name != "local" or math.prod(mesh.axis_sizes) > 1:
        dispatcher = DISPATCHERS[name]
        return on_mesh(dispatcher, x_TD, routing, weights, run_experts, config, limit)
    weights = ExpertWeights(*(w.astype(x_TD.dtype) for w in weights))
    run = lambda rows_ND, sizes_E: run_experts(rows_ND, sizes_E, weights)  # noqa: E731
    compiled = native.serves(config.expert_backend, x_TD, routing.gates_TK)
    y_TD, computed_E = local(x_TD, routing, weights.gate_EFD.shape[0], run, compiled=compiled)
    return y_TD, Exchange(computed_E.astype(jnp.float32))


def check_name(name: str) -> None:
    """Refuses what is neither a dispatcher nor "auto".

    Raises:
      ValueError: with the names there are.
    """
    if name not in ("auto", *DISPATCHERS):
        names = ["auto", *sorted(DISPATCHERS)]
        raise ValueError(f"model.moe.dispatch.name={name!r}: must be one of {names}")
