"""Routers by themselves: the config of a layer by what a test is about, and its routing."""

from __future__ import annotations

import functools
from typing import Any

import jax

from dsmoe_jax.config import MoEConfig, RouterConfig
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.moe.routers import ROUTERS, RouterInputs, get_router
from dsmoe_jax.moe.types import Routing

TASKS = ("en", "de", "code")


def tasks_of(router: str) -> tuple[str, ...]:
    """The value of `model.moe.router.tasks` for a router of this name, be there one or not."""
    return TASKS if router in ROUTERS and ROUTERS[router].by_task else ()


def moe_config(
    router: str = "topk",
    *,
    e: int = 8,
    k: int = 2,
    options: dict[str, Any] | None = None,
    **section: Any,
) -> MoEConfig:
    """A layer of E experts without balance terms.

    Args:
      router: its name.
      e, k: the sizes of the layer.
      options: `model.moe.router.options`.
      **section: other fields of `model.moe.router`.
    """
    return MoEConfig(
        n_routed_experts=e,
        num_experts_per_tok=k,
        router=RouterConfig(router, options=FrozenDict(options or {}), **section),
        balance=FrozenDict(),
    )


@functools.partial(jax.jit, static_argnums=2)
def route(logits: jax.Array | None, inputs: RouterInputs, moe: MoEConfig) -> Routing:
    """The routing of a layer's logits."""
    router, settings = get_router(moe)
    return router.route(logits, inputs, settings)
