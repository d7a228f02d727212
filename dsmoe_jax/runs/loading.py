"""From a workdir back to the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from dsmoe_jax.config import Config, stage_of
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import check_same_corpus, open_corpus
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.training.step import abstract_model, abstract_state, state_shapes


class Run(NamedTuple):
    """A trained model with what it was trained by; `step` is that of the checkpoint."""

    config: Config
    model: Transformer
    corpus: Corpus
    step: int


def load_run(workdir: str | Path, step: int | None = None) -> Run:
    """Loads a checkpoint of a run: the newest, or that of a step.

    Its arrays go straight to their shards on the ambient mesh, whatever mesh they were saved on.

    Raises:
      ValueError: if there is no run, no such checkpoint, or it is damaged.
    """
    config = workdirs.read_config(workdir)
    if not (mesh := jax.sharding.get_mesh()).empty:
        sharding.check(state_shapes(config), mesh.shape)
    directory = Path(workdir).expanduser().absolute() / workdirs.CHECKPOINTS
    if not directory.is_dir():
        raise ValueError(f"--workdir={workdir}: the run has no checkpoint yet")
    checkpoints = Checkpoints(directory, keep=None)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"--workdir={workdir}: the run has no checkpoint yet")
        if step is not None and step not in steps:
            raise ValueError(f"--step={step}: no such checkpoint; there are {steps}")
        step = steps[-1] if step is None else step
        state, extra = checkpoints.restore(abstract_state(config), step)
    finally:
        checkpoints.close()
    corpus = open_corpus(config.data)
    check_same_corpus(corpus, extra["corpus"])
    graph = abstract_model(stage_of(config, step).config)
    model = nnx.merge(graph, state.params, state.other)
    return Run(config, model, corpus, step)
