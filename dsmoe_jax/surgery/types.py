"""Inputs and results of an operation on a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.model.build import ModelState


class Option(NamedTuple):
    """A setting of an operation: a flag of the command.

    Attributes:
      kind: int, float, bool or str.
      help: a sentence.
      default: if it is not given; None means none.
      needed: whether it must be given.
    """

    kind: type
    help: str
    default: Any = None
    needed: bool = False


class Subject(NamedTuple):
    """A trained model.

    Attributes:
      config: of its run.
      model: its arrays.
    """

    config: Config
    model: ModelState


class Outcome(NamedTuple):
    """The model after an operation.

    Attributes:
      config: of the run that goes on with it.
      model: its arrays.
      report: numbers for the history, JSON.
      text: the same for the eye.
      moments: makes of an optimizer's state, whose arrays are named as the parameters are, that of
        the new model; None: the moments have no meaning for it.
      load: the same of loads by layer and expert, (L, E).
    """

    config: Config
    model: ModelState
    report: dict[str, Any]
    text: str
    moments: Callable[[Any], Any] | None = None
    load: Callable[[np.ndarray], np.ndarray] | None = None


class Operation(NamedTuple):
    """An operation in the registry.

    Attributes:
      run: `(subject, options) -> Outcome`, pure; raises a ValueError for what does not fit.
      purpose: a line.
      options: settings by name; operations may share one.
      trainable: whether the new model can be trained; one that cannot is changed no further.
    """

    run: Callable[[Subject, Mapping[str, Any]], Outcome]
    purpose: str
    options: Mapping[str, Option]
    trainable: bool = True
