"""The stages of a run, each with its config.  A run without stages is one stage."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from dsmoe_jax.config import trees
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.run import Config, replace

SHARE = "share"
# Fixed during a run: the data, the devices, and what the training loop reads once.  Keys of `model`
# that change the parameters' shapes are refused where those are made, see training/stages.py.
_FIXED = ("name", "scale", "data.", "mesh.", "train.")
_FREE = ("train.global_batch_size", "train.accumulation_steps", "train.eval_batches")


class Stage(NamedTuple):
    """A part of a run.

    Attributes:
      first, end: updates made when it begins, and when it ends.
      sequences: number taken from the data before it.
      config: of this stage, without stages of its own.
    """

    first: int
    end: int
    sequences: int
    config: Config

    @property
    def tokens(self) -> int:
        """Tokens trained on in this stage."""
        return (self.end - self.first) * self.config.tokens_per_step


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run in order.

    Raises:
      ValueError: for an impossible table of stages.
    """
    columns = config.train.stages
    if columns is None:
        return (Stage(0, config.train.steps, 0, config),)
    share = columns.get(SHARE, ())
    _check(columns, share)
    whole = replace(config, **{"train.stages": None})
    stages = []
    first = 0
    sequences = 0
    for i in range(len(share)):
        last = i + 1 == len(share)
        end = config.train.steps if last else round(sum(share[: i + 1]) * config.train.steps)
        require(end > first, "train.stages.share", share, f"leaves stage {i} without a step")
        values = {key: column[i] for key, column in columns.items() if key != SHARE}
        try:
            in_force = replace(whole, **values)
        except ValueError as error:
            raise ValueError(f"train.stages: stage {i}: {error}") from None
        stages.append(Stage(first, end, sequences, in_force))
        sequences += (end - first) * in_force.train.global_batch_size
        first = end
    return tuple(stages)


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
            key == SHARE or key in _FREE or not key.startswith(_FIXED),
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
