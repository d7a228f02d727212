"""The stages of a run, each with its config.  A run without stages is one stage."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

from dsmoe_jax.config import trees
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.config.run import Config, replace

SHARE = "share"
# Fixed during a run: the data, the devices, and what the training loop reads once.  Keys of `model`
# that change the parameters' shapes are refused where those are made, see training/stages.py.
_FIXED = (
    "name",
    "scale",
    "data.",
    "mesh.",
    "train.",
    "model.mup_base_width",
    "optimizer.rate_changes",
)
_FREE = (
    "train.global_batch_size",
    "train.accumulation_steps",
    "train.eval_batches",
    "data.mixture.",
)


class MixtureSpan(NamedTuple):
    """Neighbouring stages with one mixture of domains and one batch size.

    Attributes:
      first: updates made when it begins.
      sequences: number taken from the data before it.
      batch_size: of each step.
      weights: `data.mixture`.
      scheduled_steps: that shares of the steps are of.
    """

    first: int
    sequences: int
    batch_size: int
    weights: FrozenDict[str, Any]
    scheduled_steps: int


class Stage(NamedTuple):
    """A part of a run.

    Attributes:
      first, end: updates made when it begins, and when it ends.
      sequences: number taken from the data before it.
      config: of this stage, without stages of its own.
      skips: of the whole run: (updates made, sequences of the data left out then).
      mixtures: of the whole run, in order; none without `data.mixture`.
    """

    first: int
    end: int
    sequences: int
    config: Config
    skips: tuple[tuple[int, int], ...] = ()
    mixtures: tuple[MixtureSpan, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens trained on in this stage."""
        return (self.end - self.first) * self.config.tokens_per_step


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run in order.

    A stage also begins where `optimizer.rate_changes` has an entry: with a peak of its own, so that
    the steps before it are those of a run without the entry, to the last bit.

    Raises:
      ValueError: for an impossible table of stages.
    """
    stages = _at_rate_changes(_stages(config), config)
    skips = []
    for step, number in config.train.skip_batches:
        in_force = next(stage.config for stage in stages if step <= stage.end)
        skips.append((step - 1, number * in_force.train.global_batch_size))
    of_run = {"skips": tuple(skips), "mixtures": _mixtures(stages)}
    return tuple(stage._replace(**of_run) for stage in stages)


def _mixtures(stages: list[Stage]) -> tuple[MixtureSpan, ...]:
    """The mixtures of a run; stages that only have another rate go on in the same one."""
    spans: list[MixtureSpan] = []
    for stage in stages:
        weights = stage.config.data.mixture
        if weights is None:
            return ()  # then none has one: a column of the table has an entry for each stage
        train = stage.config.train
        batch_size = train.global_batch_size
        if not spans or (weights, batch_size) != (spans[-1].weights, spans[-1].batch_size):
            steps = train.scheduled_steps
            spans.append(MixtureSpan(stage.first, stage.sequences, batch_size, weights, steps))
    return tuple(spans)


def _stages(config: Config) -> list[Stage]:
    columns = config.train.stages
    steps = config.train.steps
    if columns is None:
        return [Stage(0, steps, 0, config)]
    share = columns.get(SHARE, ())
    _check(columns, share)
    whole = replace(config, **{"train.stages": None})
    stages = []
    first = 0
    sequences = 0
    for i in range(len(share)):
        if first == steps < config.train.scheduled_steps:
            break  # the schedule is longer than the run
        last = i + 1 == len(share)
        end = steps if last else round(sum(share[: i + 1]) * config.train.scheduled_steps)
        end = min(end, steps)
        require(end > first, "train.stages.share", share, f"leaves stage {i} without a step")
        values = {key: column[i] for key, column in columns.items() if key != SHARE}
        in_force = _with(whole, values, f"train.stages: stage {i}")
        stages.append(Stage(first, end, sequences, in_force))
        sequences += (end - first) * in_force.train.global_batch_size
        first = end
    return stages


def _at_rate_changes(stages: list[Stage], config: Config) -> list[Stage]:
    """The stages cut where the rate changes, with their share of the peak."""
    changes = config.optimizer.rate_changes
    if not changes:
        return stages
    cut = []
    for stage in stages:
        begins = {int(step) - 1 for step, _ in changes if stage.first < step - 1 < stage.end}
        borders = sorted({stage.first, *begins, stage.end})
        for first, end in itertools.pairwise(borders):
            begun = [multiple for step, multiple in changes if step - 1 <= first]
            peak = stage.config.optimizer.peak_learning_rate * math.prod(begun)
            values = {"optimizer.peak_learning_rate": peak, "optimizer.rate_changes": ()}
            before = (first - stage.first) * stage.config.train.global_batch_size
            in_force = _with(stage.config, values, "optimizer.rate_changes")
            cut.append(Stage(first, end, stage.sequences + before, in_force))
    return cut


def _with(config: Config, values: dict[str, Any], at: str) -> Config:
    """A config with other values; an error names what they come from."""
    try:
        return replace(config, **values)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def _check(columns: dict[str, tuple[Any, ...]], share: tuple[Any, ...]) -> None:
    numbers = all(type(part) in (int, float) and part > 0 for part in share)
    require(
        bool(share) and numbers and abs(sum(share) - 1) < 1e-6,
        "train.stages.share",
        share,
        "must be shares > 0 of the steps, one a stage, that sum to 1",
    )
    for key, column in columns.items():
        at = f"train.stages.{key}"
        require(isinstance(column, tuple), at, column, "must be a tuple, with one entry a stage")
        require(len(column) == len(share), at, column, f"must have {len(share)} entries, as share")
        require(
            key == SHARE or key.startswith(_FREE) or not key.startswith(_FIXED),
            at,
            column,
            f"{key} cannot change during a run",
        )


def stage_of(config: Config, step: int) -> Stage:
    """The stage that update number `step` (1 is the first) belongs to."""
    return next(stage for stage in stages_of(config) if step <= stage.end)


def tokens_after(config: Config, step: int) -> int:
    """Tokens of the first `step` updates."""
    *_, stage = (s for s in stages_of(config) if s.first < max(step, 1))
    batch_size = stage.config.train.global_batch_size
    sequences = stage.sequences + (step - stage.first) * batch_size
    return sequences * config.data.sequence_length


def every_value(config: Config, key: str) -> list[Any]:
    """The values that a dotted key has in the stages of a run, in order."""
    return [dict(trees.flatten(trees.to_tree(stage.config)))[key] for stage in stages_of(config)]


def without_stages(config: Config) -> Config:
    """The config itself, for a run that is one stage."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, stages=None))
