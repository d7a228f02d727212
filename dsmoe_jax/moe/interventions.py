"""Changes to how a trained layer is used; nothing is trained anew.

They are for probes: which experts carry the loss (V1 figures 4 and 5, section 4.5).
"""

from __future__ import annotations

import dataclasses

from dsmoe_jax.config.checks import require


@dataclasses.dataclass(frozen=True)
class Intervention:
    """What differs from the layer as it was trained.

    Attributes:
      mask_best: so many of each token's best routed experts may not be chosen; it takes the next
        ones (V1 figure 4).  Only for routers by score.
      num_experts_per_tok: another K; None: the config's (V1 figure 5).
      shared_experts: False leaves the shared experts out (V1 section 4.5).
    """

    mask_best: int = 0
    num_experts_per_tok: int | None = None
    shared_experts: bool = True

    def __post_init__(self) -> None:
        require(self.mask_best >= 0, "mask_best", self.mask_best, "must be >= 0")
        k = self.num_experts_per_tok
        require(k is None or k > 0, "num_experts_per_tok", k, "must be > 0, or None")


NONE = Intervention()
