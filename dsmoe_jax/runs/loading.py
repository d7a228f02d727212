"""From a workdir back to the trained model; the optimizer's state stays on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dsmoe_jax.config import Config, replace, stage_of
from dsmoe_jax.data.corpus import TOKENIZER, Corpus
from dsmoe_jax.data.opening import (
    check_same_corpus,
    is_there,
    locate,
    open_corpus,
    tokenizer_fingerprint,
)
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.model.build import ModelState, abstract_model, model_shapes
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.checkpoint import MODEL, Checkpoints, target
from dsmoe_jax.runs.saved_arrays import Index, SavedArrays
from dsmoe_jax.storage.places import place_of


class Run(NamedTuple):
    """A trained model with what it was trained by; `step` is that of the checkpoint."""

    config: Config
    model: Transformer
    corpus: Corpus
    step: int


class Writer(NamedTuple):
    """A trained model with its tokenizer: what generating text takes, and measuring other text."""

    config: Config
    model: Transformer
    tokenizer: Tokenizer
    tokenizer_file: Path
    step: int


class Loaded(NamedTuple):
    """The arrays of a model from a checkpoint, its step, and what was saved beside (JSON)."""

    state: ModelState
    step: int
    extra: dict[str, Any]


def load_run(workdir: str | Path, step: int | None = None, corpus: str | None = None) -> Run:
    """Loads the model of a checkpoint of a run, of the newest or of a step, and opens its corpus.

    Its arrays go straight to their shards on the ambient mesh, whatever mesh they were saved on.

    Args:
      workdir: of the run.
      step: of the checkpoint; None is the newest.
      corpus: where the text of the run is now; None: where it was.

    Raises:
      ValueError: if there is no run, no such checkpoint, it is damaged, or the text is another.
    """
    config = workdirs.read_config(workdir)
    if corpus is not None:
        config = replace(config, **{workdirs.MOVED: locate(corpus, "--moved_corpus")})
    elif config.data.corpus is None:
        raise ValueError(
            "data.corpus=None: the model was not trained here, so there is no text of its own;"
            " --corpus=PATH measures other text"
        )
    elif not is_there(config.data.corpus):
        raise ValueError(
            f"data.corpus={config.data.corpus!r}: the text of the run is not there any more; say"
            " where it is now: --moved_corpus=PATH"
        )
    model, loaded = _load_model(config, workdir, step)
    opened = open_corpus(config.data)
    check_same_corpus(opened, loaded.extra["corpus"])
    return Run(config, model, opened, loaded.step)


def load_writer(workdir: str | Path, step: int | None = None) -> Writer:
    """Loads the model of a checkpoint of a run and its tokenizer; opens no corpus.

    Args:
      workdir: of the run.
      step: of the checkpoint; None is the newest.

    Raises:
      ValueError: if there is no run, no such checkpoint, or one of its files is damaged.
    """
    config = workdirs.read_config(workdir)
    path = place_of("--workdir", workdir) / workdirs.TOKENIZER
    if not path.exists() and config.data.corpus is None:
        raise ValueError(f"{path}: there is none; the model was converted without a tokenizer")
    if not path.exists():  # a run from before it was kept
        run = load_run(workdir, step)
        file = run.corpus.directory / TOKENIZER
        return Writer(run.config, run.model, run.corpus.tokenizer, file, run.step)
    tokenizer = Tokenizer.load(path)
    model, loaded = _load_model(config, workdir, step)
    if tokenizer_fingerprint(tokenizer) != loaded.extra["tokenizer"]:
        raise ValueError(
            f"{path}: is not the tokenizer that the model was trained with; remove it, and the"
            " tokenizer of the corpus is taken"
        )
    return Writer(config, model, tokenizer, path, loaded.step)


def _load_model(
    config: Config, workdir: str | Path, step: int | None
) -> tuple[Transformer, Loaded]:
    """The model of a checkpoint, as it is in the stage of its step."""
    shapes = model_shapes(config.model)
    if not (mesh := jax.sharding.get_mesh()).empty:
        sharding.check(shapes, mesh.shape)
    loaded = load_model_state(workdir, shapes, step)
    graph = abstract_model(stage_of(config, loaded.step).config.model)
    return nnx.merge(graph, *loaded.state), loaded


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
        step = _one_of(checkpoints, step)
        restored = checkpoints.restore(step, {MODEL: target(shapes)})
    return Loaded(restored.items[MODEL], step, restored.extra)


class SavedModel(NamedTuple):
    """The arrays of a model in a checkpoint, of which any part can be read, and its step."""

    checkpoints: Checkpoints
    arrays: SavedArrays
    step: int

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of an array, as `SavedArrays.read`.

        Raises:
          ValueError: if the checkpoint is damaged.
        """
        with self.checkpoints.reading(self.step):
            return self.arrays.read(name, index)

    def check(self) -> None:
        """Makes sure that what was read, everything once, is what was saved.

        Raises:
          ValueError: if it is not.
        """
        with self.checkpoints.reading(self.step):
            self.arrays.check()


@contextlib.contextmanager
def saved_model(
    workdir: str | Path, shapes: ModelState, step: int | None = None, key: str | None = None
) -> Iterator[SavedModel]:
    """Opens the model of a checkpoint, to be read part by part; arguments of `load_model_state`.

    Raises:
      ValueError: if there is no such checkpoint, or it is damaged.
    """
    with saved_checkpoints(workdir, key) as checkpoints:
        step = _one_of(checkpoints, step)
        yield SavedModel(checkpoints, checkpoints.arrays(step, MODEL, shapes), step)


def _one_of(checkpoints: Checkpoints, step: int | None) -> int:
    """A step that is there; None is the newest."""
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise ValueError(f"--step={step}: no such checkpoint; there are {steps}")
    return steps[-1] if step is None else step


def check_moved(workdir: str | Path, corpus: Corpus) -> None:
    """Refuses a corpus that is not the text of the newest checkpoint of a run.

    Raises:
      ValueError: if it is another text, or there is no checkpoint.
    """
    with saved_checkpoints(workdir) as checkpoints:
        extra = checkpoints.restore(checkpoints.steps()[-1], {}).extra
    check_same_corpus(corpus, extra["corpus"])


@contextlib.contextmanager
def saved_checkpoints(workdir: str | Path, key: str | None = None) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run for reading.

    Raises:
      ValueError: if there are none.
    """
    error = ValueError(f"{key or f'--workdir={workdir}'}: the run has no checkpoint yet")
    directory = place_of("--workdir", workdir) / workdirs.CHECKPOINTS
    if not directory.is_dir():
        raise error
    checkpoints = Checkpoints(directory, keep=None)
    try:
        if not checkpoints.steps():
            raise error
        yield checkpoints
    finally:
        checkpoints.close()
