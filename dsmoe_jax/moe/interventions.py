"""Changes to how a trained layer is used; nothing is trained anew.

Most are for probes: which experts carry the loss (V1 figures 4 and 5, section 4.5).  `GENERATION`
is how a model that writes text uses its layers.

Experts that are left out for good are no part of `Intervention`, but an input of the model
(`ModelInputs.left_out_LE`): a probe leaves out one after the other without compiling each time.

Shapes: L MoE layers, E routed experts, G groups.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.moe.routers import get_router


@dataclasses.dataclass(frozen=True)
class Intervention:
    """A change to how a trained layer is used.

    Attributes:
      mask_best: number of each token's best routed experts to mask; the token takes the next ones
        (V1 figure 4).  Only for routers that choose by score.  Identity experts are choices like
        the others here.
      num_experts_per_tok: another K; None: the config's (V1 figure 5).
      shared_experts: False leaves the shared experts out (V1 section 4.5).
      tokens_alone: a token's experts do not depend on other tokens: nothing is dropped, and a
        router whose tokens compete routes each by itself (`Router.alone`).  Only in evaluation.
      keep_inputs: the report has the layer's input, which is as large as the activations.
    """

    mask_best: int = 0
    num_experts_per_tok: int | None = None
    shared_experts: bool = True
    tokens_alone: bool = False
    keep_inputs: bool = False

    def __post_init__(self) -> None:
        require(self.mask_best >= 0, "mask_best", self.mask_best, "must be >= 0")
        k = self.num_experts_per_tok
        require(k is None or k > 0, "num_experts_per_tok", k, "must be > 0, or None")


NONE = Intervention()
# A text must not depend on the other texts that are written at the same time.
GENERATION = Intervention(tokens_alone=True)


def check(intervention: Intervention, moe: MoEConfig) -> None:
    """Refuses an intervention that the router would ignore, or has too few experts for.

    Raises:
      ValueError: naming the field of the intervention.
    """
    router, settings = get_router(moe)
    name = moe.router.name
    masked = intervention.mask_best
    k = intervention.num_experts_per_tok or settings.k
    own = settings.k if router.own_k else router.top
    require(
        own in (None, k),
        "num_experts_per_tok",
        k,
        f"the {name} router activates exactly {own}; must be None",
    )
    require(
        router.masks_best or not masked,
        "mask_best",
        masked,
        f"the {name} router does not choose by score; must be 0",
    )
    reachable = moe.router.topk_group * (moe.n_choices // moe.router.n_group)
    key, value = ("mask_best", masked) if masked else ("num_experts_per_tok", k)
    require(
        masked + k <= reachable,
        key,
        value,
        f"a token may use {reachable} experts; {masked} masked and {k} activated ones must not be"
        " more",
    )


def check_router(moe: MoEConfig) -> None:
    """Refuses to leave experts out where a token has no next best ones.

    Raises:
      ValueError: naming the router.
    """
    name = moe.router.name
    if not get_router(moe)[0].leaves_out:
        raise ValueError(f"left_out: the choice of the {name} router is fixed; must be no expert")


def check_left_out(
    left_out_LE: np.ndarray, n_layers: int, moe: MoEConfig, intervention: Intervention = NONE
) -> None:
    """Refuses experts that cannot be left out, or so many that a token might find too few.

    Args:
      left_out_LE: bool, experts that no token may choose.
      n_layers: L.
      moe: of the layers.
      intervention: at the same time.

    Raises:
      ValueError: naming the layer and what would be left.
    """
    check_router(moe)
    wanted = n_layers, moe.n_routed_experts
    shape = left_out_LE.shape
    require(shape == wanted, "left_out of layers x experts", shape, f"must be {wanted}")
    masked = intervention.mask_best
    k = intervention.num_experts_per_tok or moe.num_experts_per_tok
    for layer, left_out_E in enumerate(left_out_LE):
        reachable = _fewest_reachable(left_out_E, moe)
        require(
            masked + k <= reachable,
            f"left_out of MoE layer {layer}",
            np.flatnonzero(left_out_E).tolist(),
            f"a token may be left with {reachable} experts; {masked} masked and {k} activated ones"
            " must not be more",
        )


def _fewest_reachable(left_out_E: np.ndarray, moe: MoEConfig) -> int:
    """The fewest experts that a token may find in the groups that it chooses."""
    is_there = ~np.pad(left_out_E, (0, moe.n_choices - len(left_out_E)))
    left_G = is_there.reshape(moe.router.n_group, -1).sum(axis=1)
    # An empty group is chosen after all others, and adds nothing.
    return int(np.sort(left_G[left_G > 0])[: moe.router.topk_group].sum())
