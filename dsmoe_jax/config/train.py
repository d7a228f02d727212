"""The section `train` of a config."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsmoe_jax.config.checks import checker, is_by_step, not_negative, positive
from dsmoe_jax.config.frozen import FrozenDict


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """The parameters that a run trains; all others keep every bit, and so does a frozen router."""

    part: str = "all"  # a name in dsmoe_jax/training/freezing.py
    # The ids of the experts to train in each MoE layer, for a part that asks for them.
    experts: tuple[tuple[int, ...], ...] | None = None
    # In place of ids: results of `evaluate --out`; in each layer the fewest experts are trained
    # whose share of the load there reaches `share`.
    most_used_in: str | None = None
    share: float = 0.2  # ESFT's threshold for token selection (2407.01906)

    def __post_init__(self) -> None:
        at = "train.trainable."
        check = checker(self, at)
        positive(self, at, "share")
        check("share", self.share <= 1, "must be at most 1")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """A trained model, the teacher, whose predictions this run learns beside the text.

        loss = (1 - factor) cross-entropy of the text
               + factor temperature^2 KL(teacher || student), both at the temperature

    after Hinton et al. (1503.02531), who weigh the text considerably less than the teacher.  The
    defaults are those of Switch Transformers (2101.03961, section 4.2), which distil a mixture into
    a dense model: 0.25 of the teacher's predictions, 0.75 of the text.
    """

    teacher: str | None = None  # its workdir; the same tokenizer and vocabulary
    factor: float = 0.25
    temperature: float = 1.0  # both models' logits are divided by it
    # Weight of the mean squared difference of what the two heads get: the last layers' outputs,
    # normed.  Both models must be of one hidden size.  None: these are not compared.
    hidden_factor: float | None = None

    def __post_init__(self) -> None:
        at = "train.distillation."
        check = checker(self, at)
        check("teacher", bool(self.teacher), "must be the workdir of a trained model")
        positive(self, at, "factor", "temperature", "hidden_factor")
        check("factor", self.factor <= 1, "must be at most 1: the text has the rest")


@dataclasses.dataclass(frozen=True)
class SpikesConfig:
    """A rule for steps whose loss jumps up; see dsmoe_jax/training/spikes.py."""

    action: str = "warn"  # a name in dsmoe_jax/training/spikes.py: warn, skip or rewind
    watch: str = "loss"  # or "grad_norm"
    threshold: float = 8.0  # robust standard deviations above the median of the window
    window: int = (
        128  # steps, of which the last values are; nothing is a spike until they are there
    )
    limit: int = 8  # the run ends after so many skips in a row, or returns to one checkpoint
    from_step: int = 1  # the window begins to fill at this step

    def __post_init__(self) -> None:
        at = "train.spikes."
        check = checker(self, at)
        positive(self, at, "threshold", "limit", "from_step")
        check("window", self.window >= 4, "must be at least 4: fewer have no spread")
        check("watch", self.watch in ("loss", "grad_norm"), "must be 'loss' or 'grad_norm'")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of a run, its batches, and the files that it keeps.

    `stages` cuts a run into parts.  It is a table: a column by dotted key, entry i for stage i;
    `share` is of the steps.  Any key that can change during a run may have a column:

        train.stages.share = (0.3, 0.5, 0.2)
        train.stages.model.moe.num_experts_per_tok = (3, 7, 15)

    All stages read one stream of data: each goes on with the sequence after the last one of the
    stage before.
    """

    steps: int = 25_000
    # Passes over the training text: `steps` is then what they take, rounded up, counted from the
    # corpus when the run begins.
    epochs: float | None = None
    # Shares (optimizer.decay_at, schedules of balance terms, stages) are of so many steps; None: of
    # `steps`.  A run that is trained for longer keeps those that it had, and its past.
    schedule_steps: int | None = None
    global_batch_size: int = 2048  # sequences of one optimizer step
    accumulation_steps: int = 1  # the global batch is computed in this many micro-batches
    # With mesh.stage > 1: groups of layers that each stage holds, not next to each other.
    pipeline_repeats: int = 1
    # With mesh.stage > 1: micro-batches that pass through the stages before the pipeline is emptied
    # and their gradient added to the others'; it keeps what their backward passes need. None: all.
    pipeline_micro_batches: int | None = None
    seed: int = 0  # 0 to 2^32 - 1: every random choice derives from it
    log_every: int = 10
    checkpoint_every: int = 1000
    # Also as often as saving takes at most this share of the time, as measured: where machines are
    # taken away, 0.01 loses little.  The first one comes after the first steps.
    checkpoint_share: float | None = None
    keep_checkpoints: int = 2  # of the newest ones
    keep_every: int | None = None  # a checkpoint every so many steps that is never pruned
    keep_best: int | None = None  # one at each evaluation, so many of the lowest loss never pruned
    eval_every: int | None = None  # None: only after the last step
    eval_batches: int | None = None  # None: the whole validation split
    # Tables of what the experts serve, in WORKDIR/analysis: every so many steps and after the last.
    analyse_every: int | None = None
    # Pairs (step, number): before this step so many batches of its size are left out of the data.
    skip_batches: tuple[tuple[int, ...], ...] = ()
    spikes: SpikesConfig | None = None  # None: a jump of the loss is nobody's business
    start_from: str | None = None  # the workdir of a run whose parameters this one begins with
    distillation: DistillationConfig | None = None  # None: it learns from the text alone
    trainable: TrainableConfig = TrainableConfig()
    stages: FrozenDict[str, tuple[Any, ...]] | None = None
    record_routing: bool = False  # keep every step's expert ids and gates in WORKDIR/routing
    replay_routing: str | None = None  # such a directory, for a router that replays it

    def __post_init__(self) -> None:
        at = "train."
        check = checker(self, at)
        positive(
            self,
            at,
            "steps",
            "epochs",
            "schedule_steps",
            "global_batch_size",
            "accumulation_steps",
            "pipeline_repeats",
            "pipeline_micro_batches",
            "log_every",
            "checkpoint_every",
            "checkpoint_share",
            "keep_checkpoints",
            "keep_every",
            "keep_best",
            "eval_every",
            "eval_batches",
            "analyse_every",
        )
        not_negative(self, at, "seed")
        check(
            "keep_best",
            self.keep_best is None or self.eval_every is not None,
            "needs train.eval_every; otherwise only the last step is evaluated",
        )
        check(
            "checkpoint_share",
            self.checkpoint_share is None or self.checkpoint_share < 1,
            "must be a share of the time, below 1",
        )
        check("steps", self.steps < 2**31, "must be below 2^31: the device counts them in int32")
        check(
            "skip_batches",
            is_by_step(self.skip_batches, self.steps) and all(n > 0 for _, n in self.skip_batches),
            f"must be pairs (step, number > 0) with growing steps, from 1 to steps={self.steps}",
        )
        check(
            "accumulation_steps",
            self.global_batch_size % self.accumulation_steps == 0,
            f"must divide global_batch_size={self.global_batch_size}",
        )

    @property
    def scheduled_steps(self) -> int:
        """The steps that shares are of."""
        return self.steps if self.schedule_steps is None else self.schedule_steps
