"""The section `optimizer` of a config."""

from __future__ import annotations

import dataclasses

from dsmoe_jax.config.checks import checker, is_by_step, not_negative, positive


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule (V1 section 4.1.3)."""

    peak_learning_rate: float = 1.08e-3
    schedule: str = "multi_step"  # a name in dsmoe_jax/training/optimizer.py
    warmup_steps: int = 2000
    decay_factor: float = 0.316  # `multi_step`: applied at each of `decay_at`; `cosine`: at the end
    decay_at: tuple[float, ...] = (0.8, 0.9)  # shares of all steps
    # Pairs (step, multiple): from this update on the rate is the schedule's times the multiple; all
    # that have begun count.
    rate_changes: tuple[tuple[float, ...], ...] = ()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        at = "optimizer."
        check = checker(self, at)
        positive(self, at, "peak_learning_rate", "decay_factor", "eps", "clip_norm")
        not_negative(self, at, "warmup_steps", "weight_decay", "b1", "b2")
        check(
            "peak_learning_rate",
            self.peak_learning_rate <= 10,
            "must be at most 10: AdamW moves each weight by about the rate in every step",
        )
        check(
            "weight_decay",
            self.weight_decay * self.peak_learning_rate < 1,
            f"times peak_learning_rate={self.peak_learning_rate} it must be below 1, the share of"
            " a weight that decays in a step",
        )
        check(
            "rate_changes",
            is_by_step(self.rate_changes) and all(x > 0 for _, x in self.rate_changes),
            "must be pairs (step, multiple > 0) with growing whole steps from 1",
        )
        for name in ("b1", "b2"):  # what rounds to 1 makes AdamW divide by 0
            check(name, getattr(self, name) < 1 - 2**-25, "must be below 1 in float32")
        increasing = tuple(sorted(self.decay_at)) == self.decay_at
        check(
            "decay_at",
            increasing and all(0 < share < 1 for share in self.decay_at),
            "must be increasing shares between 0 and 1",
        )
