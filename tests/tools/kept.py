"""Runs of one config share their programs: a second run, or one that goes on, traces nothing anew.

For files of tests about what `train` does around its steps: `pytest.mark.usefixtures
("kept_programs")`.  Not for tests that change what a step computes other than by the config.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
from flax import nnx

from dsmoe_jax.config import Config
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.training import stages
from dsmoe_jax.training.step import TrainStep, jit_train_step

# Settings of when something is read, written or measured: no program depends on them.
_TIMES: dict[str, Any] = {
    "log_every": 1, "eval_every": None, "checkpoint_every": 1, "skip_batches": (),
    "keep_best": None, "keep_every": None, "keep_checkpoints": 1,
}  # fmt: skip
_kept: dict[Any, Any] = {}


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Keeps the programs of all runs made meanwhile, for later ones of this process too."""
    changes = {"jit_train_step": _train_step, "HeldOut": _held_out}
    with mock.patch.multiple(stages, **changes):
        yield


def _train_step(config: Config, bytes_V: Any) -> TrainStep:
    steps = config.train.scheduled_steps  # a longer run has the schedule of a shorter one
    train = dataclasses.replace(config.train, **_TIMES, steps=steps, schedule_steps=steps)
    plain = dataclasses.replace(config, name="", train=train)
    key = plain, bytes_V.tobytes(), jax.sharding.get_mesh()
    if key not in _kept:
        _kept[key] = jit_train_step(config, bytes_V)
    return _kept[key]


def _held_out(
    graph: nnx.GraphDef,
    corpus: Corpus,
    batch_size: int,
    max_batches: int | None,
    recorder: Any,
    recording: Any,
    *,
    keep_routing: bool,
    tasks: Sequence[str] = (),
) -> HeldOut:
    arguments = graph, corpus, batch_size, max_batches, recorder, recording
    if recorder is not None or recording is not None:  # of one run
        return HeldOut(*arguments, keep_routing=keep_routing, tasks=tasks)
    mesh = jax.sharding.get_mesh()
    key = graph, corpus.directory, batch_size, max_batches, keep_routing, tuple(tasks), mesh
    if key not in _kept:
        _kept[key] = HeldOut(*arguments, keep_routing=keep_routing, tasks=tasks)
    return _kept[key]
