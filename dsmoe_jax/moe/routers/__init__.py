"""Routers, the first seam: pure functions from logits to a `Routing`.

A new router is a function (in `scored` if it chooses by affinity, `balanced` or `assignment` if
experts choose or are filled evenly, `policy` if it draws them, `fixed` if it learns nothing) and a
line in `ROUTERS`, which says all that others must know of it.  A router knows no devices and owns
no parameters; the logits `u_t . e_i` are computed by the layer, in float32 unless `logits_dtype`
says otherwise.

Shapes: T tokens, E routed experts, K activated ones per token, L MoE layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from dsmoe_jax.config import MoEConfig, RouterConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.config.tasks import task_of
from dsmoe_jax.moe.routers import assignment, balanced, fixed, policy, scored
from dsmoe_jax.moe.routers.scores import SCORING
from dsmoe_jax.moe.routers.settings import RouterSettings
from dsmoe_jax.moe.schedules import Progress
from dsmoe_jax.moe.types import RouterInputs, Routing

_GATES = frozenset({"norm_topk_prob", "routed_scaling_factor"})
_BIAS_KEYS = frozenset({"bias_update_speed", "bias_update_schedule"})
_CHOICE = frozenset({"n_group", "topk_group", "group_score", "jitter"}) | _BIAS_KEYS
_SCORED = _GATES | _CHOICE | {"scoring_func"}


class RouterState(NamedTuple):
    """Variables of a router that are not parameters: no gradient and no weight decay changes them.

    Attributes:
      first: `settings -> {name: array}`, the values before the first step; names end in logical
        axes, as those of parameters do.  Empty for settings that need no variable.
      from_token_counts: `(counts_V, settings) -> {name: array}`, first values that depend on how
        often each token is in the training text; None: there are none.
      after_step: `(state, load_LE, progress, settings) -> {name: array}`, the values after an
        optimizer step in which the experts got `load_LE` of the global batch; arrays have a leading
        layer axis.  None: they do not change.
      holds_ids: their values are ids of experts.
    """

    first: Callable[[RouterSettings], dict[str, jax.Array]]
    from_token_counts: Callable[[np.ndarray, RouterSettings], dict[str, np.ndarray]] | None = None
    after_step: (
        Callable[
            [Mapping[str, jax.Array], jax.Array, Progress, RouterSettings], dict[str, jax.Array]
        ]
        | None
    ) = None
    holds_ids: bool = False


_BY_TASK = _SCORED - {"jitter"} | {"tasks"}
_BIAS = RouterState(scored.first_bias, after_step=scored.move_bias)
_TABLE = RouterState(fixed.first_table, from_token_counts=fixed.table_from_counts, holds_ids=True)
_CHOICES = RouterState(
    fixed.first_choices, from_token_counts=fixed.choices_from_counts, holds_ids=True
)
_TASK_TABLE = RouterState(fixed.first_task_table, holds_ids=True)


class Router(NamedTuple):
    """A router in the registry: its function, and all that others must know of it.

    Attributes:
      route: `(logits, inputs, settings) -> Routing`.
      reads: the fields of `RouterConfig` that this router uses; the others must have their
        defaults.  What the layer reads, `settings_read` adds.
      options: settings that this router alone has, with their defaults.
      logits_per_expert: rows that the layer's router matrix has for each expert, so that `logits`
        are (T, rows x E); 0: nothing is learned, `logits` are None.
      interleaved: with several rows for each expert, those of an expert lie side by side; else the
        first rows of all experts come first.
      by_task: it chooses by the task of a token's document, of `RouterConfig.tasks`.  What is
        learned of it is a logit of each expert for each task.
      alters_logits: the routing's logits are not those that the layer computed.
      top: the K that the router is defined for; None: any.
      own_k: the K of its variables is that of the config, and no intervention can change it.
      competes: the tokens of a micro-batch compete for experts.
      alone: `(logits, inputs, settings) -> Routing` of each token by itself, for generation; None:
        `route` does so in evaluation.
      balanced: the load is even by construction, or fixed; balance terms have no effect.
      all_columns: a routing has a column for each of the experts, not K of them.
      masks_best: in evaluation its choice is by score, so that a token's best experts can be
        masked (`RouterSettings.mask_best`).
      leaves_out: in evaluation a token takes its next best experts where some are left out
        (`RouterInputs.left_out_E`).
      samples: draws from a policy, which learns by `policy.policy_loss`.
      needs_recording: what it replays: "" nothing, "ids" the recorded experts in training,
        "routing" experts and gates, in evaluation too.
      state: its variables; None: it has none.
    """

    route: Callable[..., Routing]
    reads: frozenset[str] = frozenset()
    options: Mapping[str, Any] = MappingProxyType({})
    logits_per_expert: int = 1
    interleaved: bool = False
    by_task: bool = False
    alters_logits: bool = False
    top: int | None = None
    own_k: bool = False
    competes: bool = False
    alone: Callable[..., Routing] | None = None
    balanced: bool = False
    all_columns: bool = False
    masks_best: bool = False
    leaves_out: bool = False
    samples: bool = False
    needs_recording: str = ""
    state: RouterState | None = None

    @property
    def learned(self) -> bool:
        """Whether the layer has a router matrix, and so the router has affinities."""
        return self.logits_per_expert > 0

    @property
    def settings_read(self) -> frozenset[str]:
        """All fields of `RouterConfig` that have a meaning for this router."""
        of_product = self.learned and not self.by_task
        of_layer = {"logits_dtype", "logits_bias", "gates_dtype"}
        return self.reads | of_layer if of_product else self.reads

    def columns(self, n_choices: int, k: int) -> int:
        """Columns of its routings, unassigned ones included."""
        return n_choices if self.all_columns else k


ROUTERS: dict[str, Router] = {
    "topk": Router(scored.topk, _SCORED, masks_best=True, leaves_out=True, state=_BIAS),
    "switch": Router(scored.topk, _SCORED, top=1, masks_best=True, leaves_out=True, state=_BIAS),
    "gshard": Router(
        scored.gshard,
        _SCORED,
        {"random_second_expert": False},
        top=2,
        masks_best=True,
        leaves_out=True,
        state=_BIAS,
    ),
    "noisy_topk": Router(
        scored.noisy_topk,
        _SCORED,
        logits_per_expert=2,
        alters_logits=True,
        masks_best=True,
        leaves_out=True,
        state=_BIAS,
    ),
    "dynamic_specialised": Router(
        scored.dynamic_specialised,
        _SCORED - {"scoring_func"},
        logits_per_expert=scored.SUB_EXPERTS,
        interleaved=True,
        masks_best=True,
        leaves_out=True,
        state=_BIAS,
    ),
    "sinkhorn": Router(
        balanced.sinkhorn,
        _GATES | {"scoring_func", "jitter"},
        {"iterations": 8},
        competes=True,
        masks_best=True,
        leaves_out=True,
    ),
    "base": Router(
        assignment.base,
        frozenset({"routed_scaling_factor", "jitter"}),
        top=1,
        competes=True,
        balanced=True,
        leaves_out=True,
    ),
    "expert_choice": Router(
        balanced.expert_choice,
        frozenset({"scoring_func", "routed_scaling_factor", "jitter"}),
        competes=True,
        alone=scored.topk,
        balanced=True,
        all_columns=True,
        leaves_out=True,
    ),
    "reinforce": Router(
        policy.reinforce,
        frozenset({"routed_scaling_factor", "jitter"}),
        {"entropy_factor": 0.0},
        leaves_out=True,
        samples=True,
    ),
    "hash": Router(
        fixed.hash_tokens,
        options={"table": "random", "seed": 0},
        logits_per_expert=0,
        top=1,
        balanced=True,
        state=_TABLE,
    ),
    "token_table": Router(
        scored.token_table,
        _GATES | {"scoring_func", "jitter"},
        {"seed": 0},
        own_k=True,
        balanced=True,
        state=_CHOICES,
    ),
    "task": Router(
        scored.topk, _BY_TASK, by_task=True, masks_best=True, leaves_out=True, state=_BIAS
    ),
    "task_table": Router(
        fixed.task_table,
        frozenset({"routed_scaling_factor", "tasks"}),
        logits_per_expert=0,
        by_task=True,
        own_k=True,
        balanced=True,
        state=_TASK_TABLE,
    ),
    "replay": Router(fixed.replay, logits_per_expert=0, balanced=True, needs_recording="routing"),
    "replay_ids": Router(
        scored.replay_ids,
        _GATES | {"scoring_func"},
        masks_best=True,
        leaves_out=True,
        needs_recording="ids",
    ),
    "uniform": Router(fixed.uniform, logits_per_expert=0, alone=fixed.first_experts, balanced=True),
}


def get_router(moe: MoEConfig) -> tuple[Router, RouterSettings]:
    """The router of a layer, and the settings that it is called with.

    Raises:
      ValueError: for an unknown name or option, or settings that the router cannot serve.
    """
    config = moe.router
    known = sorted(ROUTERS)
    require(config.name in ROUTERS, "model.moe.router.name", config.name, f"must be one of {known}")
    router = ROUTERS[config.name]
    k = moe.num_experts_per_tok
    if router.top not in (None, k):
        experts = "expert" if router.top == 1 else "experts"
        raise ValueError(
            f"model.moe.num_experts_per_tok={k}:"
            f" the {config.name} router activates exactly {router.top} {experts}"
        )
    scoring = config.scoring_func
    known = sorted(SCORING)
    require(scoring in SCORING, "model.moe.router.scoring_func", scoring, f"must be one of {known}")
    _refuse_unread(config, router)
    if config.norm_topk_prob and k == 1:
        raise ValueError(
            "model.moe.router.norm_topk_prob=True: with num_experts_per_tok=1 every gate would be"
            " 1 and the router would learn nothing; must be False"
        )
    require(
        not router.by_task or len(config.tasks) > 1,
        "model.moe.router.tasks",
        config.tasks,
        f"the {config.name} router chooses by task, of which there must be two or more; training"
        " takes the domains of its corpus",
    )
    options = FrozenDict({**router.options, **config.options})
    filled = dataclasses.replace(config, options=options)
    return router, RouterSettings(filled, moe.n_choices, k, n_identity=moe.n_identity_experts)


def task_number(moe: MoEConfig, name: str | None, key: str) -> int | None:
    """The number of a task that a user names; None for a router that does not choose by task.

    Args:
      moe: config of the layers.
      name: of the task, or of a domain of it; None: the user names none.
      key: what the user calls it, for errors.

    Raises:
      ValueError: for a name that is missing, unknown, or has no meaning.
    """
    router = moe.router
    by_task = moe.n_routed_experts > 0 and get_router(moe)[0].by_task
    if not by_task:
        unused = "has no meaning for this model, whose experts are not chosen by task"
        require(name is None, key, name, unused)
        return None
    known = f"must be one of {', '.join(router.tasks)}"
    if name is None:
        raise ValueError(f"{key}: missing; the {router.name} router chooses by task; {known}")
    number = task_of(name, router.tasks)
    require(number is not None, key, name, known)
    return number


def _refuse_unread(config: RouterConfig, router: Router) -> None:
    """Refuses settings that the router would ignore, and options that it does not have."""
    for field in dataclasses.fields(RouterConfig):
        if field.name in ("name", "options") or field.name in router.settings_read:
            continue
        value = getattr(config, field.name)
        readers = sorted(name for name, r in ROUTERS.items() if field.name in r.settings_read)
        require(
            value == field.default,
            f"model.moe.router.{field.name}",
            value,
            f"the {config.name} router does not know it; must be {field.default!r}, or the router"
            f" one of {readers}",
        )
    for name, value in config.options.items():
        key = f"model.moe.router.options.{name}"
        close = difflib.get_close_matches(name, router.options, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {sorted(router.options)}"
        require(
            name in router.options, key, value, f"the {config.name} router does not know it; {hint}"
        )
        kind = type(router.options[name])
        number = kind is float and type(value) is int
        require(type(value) is kind or number, key, value, f"must be of type {kind.__name__}")
        in_range = not isinstance(value, (int, float)) or 0 <= value < math.inf
        require(in_range, key, value, "must be finite and >= 0")


__all__ = [
    "ROUTERS",
    "Router",
    "RouterInputs",
    "RouterSettings",
    "RouterState",
    "get_router",
    "task_number",
]
