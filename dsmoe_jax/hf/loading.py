"""From the directory of a Hugging Face model to one of ours, tensor by tensor.

The float32 arrays of the model are all that is held: each is filled in place, and on a mesh each
process reads only the parts that its devices have.

Shapes: L layers of a stack.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.hf import configs, names
from dsmoe_jax.hf.files import Checkpoint
from dsmoe_jax.hf.names import Line
from dsmoe_jax.hf.tensors import Index
from dsmoe_jax.model.build import ModelState, abstract_model, model_shapes
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.parallel import sharding
from dsmoe_jax.progress import ProgressLine, Silent
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.checkpoint import target

CONFIG = "config.json"
_ALIGNMENT = 64  # bytes; XLA on CPU uses an array that is aligned so as it is, without a copy

Allocate = Callable[[str, tuple[int, ...]], np.ndarray]  # (path, shape) -> an empty float32 array


class Source(NamedTuple):
    """A model of Hugging Face whose names and shapes have been checked; no weight is read yet.

    Attributes:
      directory: where it is.
      tree: its config.json.
      config: ours.
      checkpoint: its tensors.
      lines: what each of them holds.
      shapes: of our arrays.
      notes: what is left out, in sentences.
    """

    directory: Path
    tree: dict[str, Any]
    config: ModelConfig
    checkpoint: Checkpoint
    lines: list[Line]
    shapes: ModelState
    notes: list[str]


def open_source(directory: str | Path, key: str = "directory") -> Source:
    """Opens a model of Hugging Face.

    Args:
      directory: with config.json and safetensors files, as `save_pretrained` writes them.
      key: what the user calls it, for errors.

    Raises:
      ValueError: for a directory that holds no such model, keys and values of its config that we
        do not have, or tensors that are missing, too many or of another shape.
    """
    path = local_path(key, directory)
    if not (path / CONFIG).is_file():
        raise ValueError(f"{key}={directory}: holds no model (there is no {CONFIG})")
    tree = json_files.read(path / CONFIG)
    checkpoint = Checkpoint(path)
    notes = []
    try:
        family, config = configs.read(tree)
        if config.mtp_depth and not names.has_modules_ahead(config, checkpoint.shapes):
            # transformers writes the number, but not the tensors.
            notes.append("has no tensors of modules that predict further tokens: left out")
            config = dataclasses.replace(config, mtp=None)
        shapes = model_shapes(config)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from error
    lines = names.lines_of(family, config, names.shapes_of(shapes), checkpoint.shapes)
    names.check(checkpoint, lines, config)
    return Source(path, tree, config, checkpoint, lines, shapes, notes)


def load(directory: str | Path, *, progress: bool = True) -> Transformer:
    """A model of Hugging Face as one of ours: `model(tokens_BS) -> logits_BSV`.

    Its parameters are float32, on the default device or, on an ambient mesh, in their shards.

    Args:
      directory: with config.json and safetensors files, as `save_pretrained` writes them.
      progress: whether to show a progress line, and notes, on stderr.

    Raises:
      ValueError: as `open_source` does; for a mesh that does not divide the model, too.
    """
    return _made(open_source(directory), progress=progress)


def load_with_backend(directory: str | Path, backend: str | None) -> Transformer:
    """`load`, with an expert backend of moe/experts.py by name; None leaves the choice."""
    source = open_source(directory)
    if backend is not None:
        moe = dataclasses.replace(source.config.moe, expert_backend=backend)
        source = source._replace(config=dataclasses.replace(source.config, moe=moe))
    return _made(source, progress=False)


def _made(source: Source, *, progress: bool) -> Transformer:
    if not (mesh := jax.sharding.get_mesh()).empty:
        sharding.check(source.shapes, mesh.shape)
    if progress:
        for note in source.notes:
            print(f"{source.directory}: {note}", file=sys.stderr)
    n = len(source.lines)
    line = ProgressLine(f"loading {source.directory.name}", n) if progress else Silent()
    state = load_state(source, line)
    return nnx.merge(abstract_model(source.config), *state)


def aligned(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that XLA on CPU takes over without a copy."""
    del path
    size = int(np.prod(shape)) * 4
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)


def load_state(source: Source, line: ProgressLine, allocate: Allocate = aligned) -> ModelState:
    """The arrays of a model, in their shards on the ambient mesh.

    Args:
      source: from `open_source`.
      line: shows how many of the tensors have been read.
      allocate: makes the array that a block is read into.
    """
    tensors = names.reading(source.lines)

    def array(path: tuple, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        name = names.path_of(path)
        stacked = tensors[name][0][0].sources[0].index is not None

        def block(index: Index | None) -> np.ndarray:
            assert index is not None
            index = tuple(slice(*at.indices(n)) for at, n in zip(index, wanted.shape, strict=True))
            out = allocate(name, tuple(at.stop - at.start for at in index))
            names.read_block(source.checkpoint.read, tensors[name], stacked, index, out)
            return out

        made = jax.make_array_from_callback(wanted.shape, wanted.sharding, block)
        line.add(len(tensors[name]) / len(tensors[name][0][0].sources))
        return made

    line.add(0)
    state = jax.tree.map_with_path(array, target(source.shapes))
    line.close()
    return state
