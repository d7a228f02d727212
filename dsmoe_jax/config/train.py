"""The sections `optimizer` and `train` of a config, see dsmoe_jax/config.py."""

from __future__ import annotations

import dataclasses

from dsmoe_jax.config.checks import checker, not_negative, positive


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule (V1 section 4.1.3)."""

    peak_learning_rate: float = 1.08e-3
    schedule: str = "multi_step"  # a name in dsmoe_jax/training/optimizer.py
    warmup_steps: int = 2000
    decay_factor: float = 0.316  # `multi_step`: applied at each of `decay_at`
    decay_at: tuple[float, ...] = (0.8, 0.9)  # shares of all steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        at, check = "optimizer.", checker(self, "optimizer.")
        positive(self, at, "peak_learning_rate", "decay_factor", "eps", "clip_norm")
        not_negative(self, at, "warmup_steps", "weight_decay", "b1", "b2")
        check("b1", self.b1 < 1, "must be below 1")
        check("b2", self.b2 < 1, "must be below 1")
        increasing = tuple(sorted(self.decay_at)) == self.decay_at
        check(
            "decay_at",
            increasing and all(0 < share < 1 for share in self.decay_at),
            "must be increasing shares between 0 and 1",
        )


@dataclasses.dataclass(frozen=True)
class StagesConfig:
    """Stages of a run, as columns: entry i of each is for stage i, () keeps the run's own value.

    A column sets the key of its name in `train`, `optimizer` or `model.moe`.  All stages read one
    stream of data: each goes on with the sequence after the last one of the stage before.
    """

    share: tuple[float, ...] = ()  # of the steps; () is a run without stages
    global_batch_size: tuple[int, ...] = ()
    accumulation_steps: tuple[int, ...] = ()
    peak_learning_rate: tuple[float, ...] = ()
    num_experts_per_tok: tuple[int, ...] = ()
    topk_group: tuple[int, ...] = ()
    expert_balance_factor: tuple[float, ...] = ()
    device_balance_factor: tuple[float, ...] = ()
    communication_balance_factor: tuple[float, ...] = ()
    sequence_balance_factor: tuple[float, ...] = ()
    switch_balance_factor: tuple[float, ...] = ()
    router_z_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check = checker(self, "train.stages.")
        for name, column in dataclasses.asdict(self).items():
            n = len(self.share)
            check(name, len(column) in (0, n), f"must have {n} entries, as share has")
        shares = not self.share or (abs(sum(self.share) - 1) < 1e-6 and min(self.share) > 0)
        check("share", shares, "must be shares > 0 that sum to 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what is kept."""

    steps: int = 25_000
    global_batch_size: int = 2048  # sequences of one optimizer step
    accumulation_steps: int = 1  # the global batch is computed in this many micro-batches
    seed: int = 0  # every random choice derives from it
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    eval_every: int = 0  # 0: only after the last step
    eval_batches: int = 0  # 0: the whole validation split
    stages: StagesConfig = StagesConfig()
    record_routing: bool = False  # keep every step's expert ids and gates in WORKDIR/routing
    replay_routing: str = ""  # such a directory, for model.moe.router "replay" and "replay_ids"

    def __post_init__(self) -> None:
        at, check = "train.", checker(self, "train.")
        positive(
            self,
            at,
            "steps",
            "global_batch_size",
            "accumulation_steps",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        )
        not_negative(self, at, "eval_every", "eval_batches", "seed")
        check(
            "accumulation_steps",
            self.global_batch_size % self.accumulation_steps == 0,
            f"must divide global_batch_size={self.global_batch_size}",
        )
