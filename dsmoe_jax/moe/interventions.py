"""Changes to how a trained layer is used; nothing is trained anew.

Most are for probes: which experts carry the loss (V1 figures 4 and 5, section 4.5).  `GENERATION`
is how a model that writes text uses its layers.
"""

from __future__ import annotations

import dataclasses

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
