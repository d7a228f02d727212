"""Training steps that runs of one process share: to trace one takes half of a tiny run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.training import stages
from dsmoe_jax.training.step import TrainStep

_STEPS: dict[Any, TrainStep] = {}


@contextlib.contextmanager
def sharing() -> Iterator[dict[Any, TrainStep]]:
    """Has runs of one config, corpus and mesh share their step; yields the steps by these three.

    A run that goes on is then also held to the types of the one that began: a step refuses to be
    traced again.  Not for tests that put something else under a name of a config.  A step that
    learns from a teacher is not shared.
    """
    original = stages.jit_train_step
    _STEPS.clear()  # others may have emptied JAX's caches, as an experiment does between models

    def shared(config: Config, bytes_V: Any, *teacher: Any) -> TrainStep:
        if teacher:
            return original(config, bytes_V, *teacher)
        key = config, np.asarray(bytes_V).tobytes(), jax.sharding.get_mesh()
        if key not in _STEPS:
            _STEPS[key] = original(config, bytes_V)
        return _STEPS[key]

    with mock.patch.object(stages, "jit_train_step", shared):
        yield _STEPS
