"""From a config to its corpus, and from a workdir back to the trained model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from dsmoe_jax.checks import require
from dsmoe_jax.config import Config, DataConfig
from dsmoe_jax.data import user_files
from dsmoe_jax.data.corpus import MANIFEST, Corpus, load_corpus
from dsmoe_jax.data.fetch import cache_directory
from dsmoe_jax.data.prepare import RECIPE, prepare
from dsmoe_jax.nn.transformer import Transformer
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import BATCH_AXES, make_mesh
from dsmoe_jax.training import workdir as workdirs
from dsmoe_jax.training.checkpoint import Checkpoints
from dsmoe_jax.training.step import abstract_model, abstract_state, state_shapes

BUILT_IN = ("demo", "stdlib")


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus of a config; one that is not prepared yet is prepared now, in the cache.

    Raises:
      ValueError: naming the key, if there is no such corpus or it does not fit the config.
    """
    name = config.corpus
    if not name:
        raise ValueError(
            "data.corpus='': must be 'demo', 'stdlib', a file or directory of text, or a corpus"
            " prepared from it"
        )
    path = Path(name).expanduser()
    if name not in BUILT_IN and not path.exists():
        raise ValueError(f"data.corpus={name!r}: no such file or directory, nor one of {BUILT_IN}")
    if name not in BUILT_IN and (path / MANIFEST).is_file():
        corpus = load_corpus(path)
        _check_prepared(config, corpus)
        return corpus
    source = name if name in BUILT_IN else os.path.abspath(path)
    return prepare(
        source,
        _prepared_directory(config, source),
        config.tokenizer_vocab_size,
        config.sequence_length,
        config.domains or None,
    )


def _check_prepared(config: DataConfig, corpus: Corpus) -> None:
    """A prepared corpus has its sizes already: they must be the config's."""
    if corpus.sequence_length != config.sequence_length:
        raise ValueError(
            f"data.sequence_length={config.sequence_length}: the corpus {corpus.directory} is"
            f" packed for {corpus.sequence_length}"
        )
    if corpus.vocab_size > config.tokenizer_vocab_size:
        raise ValueError(
            f"data.tokenizer_vocab_size={config.tokenizer_vocab_size}: the corpus"
            f" {corpus.directory} has {corpus.vocab_size} tokens"
        )
    if config.domains and set(config.domains) != set(corpus.domains):
        raise ValueError(
            f"data.domains={config.domains}: the corpus {corpus.directory} has {corpus.domains};"
            " leave data.domains empty for a prepared corpus"
        )


def _prepared_directory(config: DataConfig, source: str) -> Path:
    """Where in the cache: a name for people, and a hash of all that decides the content."""
    content = (
        platform.python_version() if source in BUILT_IN else user_files.fingerprint(Path(source))
    )
    key = [
        RECIPE,
        source,
        content,
        config.tokenizer_vocab_size,
        config.sequence_length,
        config.domains,
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    return cache_directory() / "corpora" / f"{Path(source).stem}-{digest}"


def open_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, on all devices of all processes unless others are given.

    Raises:
      ValueError: naming the key, if it does not divide the devices, the batch or the model.
    """
    mesh = make_mesh(config.mesh, devices)
    sharding.check(state_shapes(config), mesh.shape)
    n_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    for train in (stage.config.train for stage in config.stages()):
        micro_batch = train.global_batch_size // train.accumulation_steps
        require(
            micro_batch % n_shards == 0,
            "train.global_batch_size",
            train.global_batch_size,
            f"must be a multiple of {n_shards * train.accumulation_steps}: the mesh splits each of"
            f" train.accumulation_steps={train.accumulation_steps} micro-batches {n_shards} ways",
        )
    return mesh


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
    graph = abstract_model(config.stage_of(step).config)
    model = nnx.merge(graph, state.params, state.other)
    return Run(config, model, corpus, step)


def check_same_corpus(corpus: Corpus, fingerprint: str) -> None:
    """Refuses to go on with other data than a checkpoint was made with.

    Raises:
      ValueError: if the corpus has changed.
    """
    if corpus.fingerprint != fingerprint:
        raise ValueError(
            f"data.corpus: {corpus.directory} has changed since the checkpoint was made"
            f" (fingerprint {corpus.fingerprint[:12]}, then {fingerprint[:12]});"
            " bring the old text back or start in another workdir"
        )
