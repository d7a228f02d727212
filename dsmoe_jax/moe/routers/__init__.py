"""Routers, the first seam: pure functions from logits to a `Routing`.

A new router is a function (in `scored` if it chooses by affinity, `balanced` or `assignment` if
experts choose or are filled evenly, `policy` if it draws them, `fixed` if it learns nothing) and a
line in `ROUTERS`.  It knows no devices and owns no parameters; the logits `u_t . e_i` are computed
by the layer, in float32.

Shapes: T tokens, E routed experts, K activated ones per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.legacy import flat
from dsmoe_jax.moe.routers import assignment, balanced, fixed, policy, scored
from dsmoe_jax.moe.types import Routing

_GATES = frozenset({"norm_topk_prob", "routed_scaling_factor"})
_CHOICE = frozenset({"n_group", "topk_group", "group_score", "bias_update_speed", "router_jitter"})
_SCORED = _GATES | _CHOICE


class Router(NamedTuple):
    """A registry line.

    Attributes:
      route: `(logits, inputs, config) -> Routing`.
      reads: the settings of `MoEConfig` that this router heeds; those of `SETTINGS` that it does
        not heed must be left at their defaults.
      logits_per_expert: rows that the layer's router matrix has for each expert, so that `logits`
        are (T, rows x E); 0: nothing is learned, `logits` are None.
      top: the K that the router is defined for; None: any.
      competes: the tokens that it sees at once, a micro-batch, compete for experts.
      balanced: even by construction, or fixed: there is nothing for a balance term to move.
    """

    route: Callable[..., Routing]
    reads: frozenset[str] = frozenset()
    logits_per_expert: int = 1
    top: int | None = None
    competes: bool = False
    balanced: bool = False

    @property
    def learned(self) -> bool:
        """Whether the layer has a router matrix, and the router affinities."""
        return self.logits_per_expert > 0


ROUTERS: dict[str, Router] = {
    "topk": Router(scored.topk, _SCORED | {"scoring_func"}),
    "switch": Router(scored.topk, _SCORED, top=1),
    "gshard": Router(scored.gshard, _SCORED | {"random_second_expert"}, top=2),
    "noisy_topk": Router(scored.noisy_topk, _SCORED, logits_per_expert=2),
    "dynamic_specialised": Router(
        scored.dynamic_specialised, _SCORED, logits_per_expert=scored.SUB_EXPERTS
    ),
    "sinkhorn": Router(
        balanced.sinkhorn,
        _GATES | {"scoring_func", "sinkhorn_iterations", "router_jitter"},
        competes=True,
    ),
    "base": Router(
        assignment.base,
        frozenset({"routed_scaling_factor", "router_jitter"}),
        top=1,
        competes=True,
        balanced=True,
    ),
    "expert_choice": Router(
        balanced.expert_choice,
        frozenset({"scoring_func", "routed_scaling_factor", "router_jitter"}),
        competes=True,
        balanced=True,
    ),
    "reinforce": Router(
        policy.reinforce,
        frozenset({"routed_scaling_factor", "router_jitter", "policy_entropy_factor"}),
    ),
    "hash": Router(
        fixed.hash_tokens,
        frozenset({"hash_table", "hash_seed"}),
        logits_per_expert=0,
        top=1,
        balanced=True,
    ),
    "replay": Router(fixed.replay, logits_per_expert=0, balanced=True),
    "replay_ids": Router(scored.replay_ids, _GATES | {"scoring_func"}),
    "uniform": Router(fixed.uniform, logits_per_expert=0, balanced=True),
}
SETTINGS = frozenset().union(*(router.reads for router in ROUTERS.values()))


DEFAULTS = dataclasses.asdict(flat(MoEConfig()))


def get_router(config: MoEConfig) -> Router:
    """The router of a config.

    Raises:
      ValueError: for an unknown name, or a config that the router cannot serve.
    """
    name, k = config.router, config.num_experts_per_tok
    if name not in ROUTERS:
        raise ValueError(f"model.moe.router.name={name!r}: must be one of {sorted(ROUTERS)}")
    router = ROUTERS[name]
    if router.top not in (None, k):
        experts = "expert" if router.top == 1 else "experts"
        raise ValueError(
            f"model.moe.num_experts_per_tok={k}:"
            f" the {name} router activates exactly {router.top} {experts}"
        )
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in SETTINGS - router.reads and value != DEFAULTS.get(field.name):
            readers = sorted(r for r in ROUTERS if field.name in ROUTERS[r].reads)
            raise ValueError(
                f"model.moe.{field.name}={value!r}: the {name} router does not know it; must be"
                f" {DEFAULTS.get(field.name)!r}, or the router one of {readers}"
            )
    if config.norm_topk_prob and k == 1:
        raise ValueError(
            "model.moe.router.norm_topk_prob=True: with num_experts_per_tok=1 every gate would be"
            " 1 and the router would learn nothing; must be False"
        )
    return router
