"""From a workdir back to the trained model; the optimizer's state stays on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from dsmoe_jax.config import Config, stage_of
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import check_same_corpus, open_corpus
from dsmoe_jax.model.build import ModelState, abstract_model, model_shapes
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.checkpoint import MODEL, Checkpoints, target


class Run(NamedTuple):
    """A trained model with what it was trained by; `step` is that of the checkpoint."""

    config: Config
    model: Transformer
    corpus: Corpus
    step: int


class Loaded(NamedTuple):
    """The arrays of a model from a checkpoint, its step, and what was saved beside (JSON)."""

    state: ModelState
    step: int
    extra: dict[str, Any]


def load_run(workdir: str | Path, step: int | None = None) -> Run:
    """Loads the model of a checkpoint of a run: of the newest, or of a step.

    Its arrays go straight to their shards on the ambient mesh, whatever mesh they were saved on.

    Raises:
      ValueError: if there is no run, no such checkpoint, or it is damaged.
    """
    config = workdirs.read_config(workdir)
    shapes = model_shapes(config.model)
    if not (mesh := jax.sharding.get_mesh()).empty:
        sharding.check(shapes, mesh.shape)
    state, step, extra = load_model_state(workdir, shapes, step)
    corpus = open_corpus(config.data)
    check_same_corpus(corpus, extra["corpus"])
    graph = abstract_model(stage_of(config, step).config.model)
    return Run(config, nnx.merge(graph, *state), corpus, step)


def load_model_state(
    workdir: str | Path, shapes: ModelState, step: int | None = None, key: str | None = None
) -> Loaded:
    """Loads the arrays of a model.

    Args:
      workdir: of a run.
      shapes: of the arrays.
      step: of the checkpoint; None is the newest.
      key: what the user calls the workdir, with its value, for errors; None is --workdir.

    Raises:
      ValueError: if there is no such checkpoint, or it is damaged.
    """
    with saved_checkpoints(workdir, key) as checkpoints:
        steps = checkpoints.steps()
        if step is not None and step not in steps:
            raise ValueError(f"--step={step}: no such checkpoint; there are {steps}")
        step = steps[-1] if step is None else step
        restored = checkpoints.restore(step, {MODEL: target(shapes)})
    return Loaded(restored.items[MODEL], step, restored.extra)


@contextlib.contextmanager
def saved_checkpoints(workdir: str | Path, key: str | None = None) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run for reading.

    Raises:
      ValueError: if there are none.
    """
    error = ValueError(f"{key or f'--workdir={workdir}'}: the run has no checkpoint yet")
    directory = Path(workdir).expanduser().absolute() / workdirs.CHECKPOINTS
    if not directory.is_dir():
        raise error
    checkpoints = Checkpoints(directory, keep=None)
    try:
        if not checkpoints.steps():
            raise error
        yield checkpoints
    finally:
        checkpoints.close()
