"""Changes of a trained model's layers while it is measured."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Intervention:
    """What is changed in every MoE layer.

    Attributes:
      mask_best: this many of the best routed experts of every token are forbidden.
      num_experts_per_tok: routed experts a token activates; None is as trained.
      shared_experts: whether the shared experts are used.
    """

    mask_best: int = 0
    num_experts_per_tok: int | None = None
    shared_experts: bool = True
