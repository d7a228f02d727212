"""From a model of ours to the directory of a Hugging Face one, piece by piece.

What is held is a piece of a tensor: neither a file nor a tensor is ever in memory as a whole.

Shapes: L layers of a stack, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.hf import configs, files, names
from dsmoe_jax.hf.files import Writer
from dsmoe_jax.hf.loading import CONFIG
from dsmoe_jax.hf.names import Line, Source
from dsmoe_jax.hf.tensors import Index, Read, pieces, side_by_side
from dsmoe_jax.model.build import model_shapes
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.runs import json_files

# Keys of a config.json that would contradict what is written.
_SAID_ANEW = ("rope_scaling", "rope_parameters", "quantization_config")
SHARD_BYTES = 5 * 10**9  # what transformers writes, too


class Destination(NamedTuple):
    """A model in the terms of Hugging Face; nothing is written yet.

    Attributes:
      tree: its config.json.
      lines: its tensors, and what each of them holds.
      shapes: of the tensors by name, in order.
      dtype: of the tensors, a name in `WRITTEN`.
    """

    tree: dict[str, Any]
    lines: list[Line]
    shapes: names.Shapes
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(files.sizes_of(self.shapes, self.dtype).values())

    def largest_shard(self, shard_bytes: int) -> int:
        """Bytes of the largest file, if a file may have so many and a tensor has no more."""
        return files.largest_shard(files.sizes_of(self.shapes, self.dtype), shard_bytes)


def describe(config: ModelConfig, dtype: str, about: Mapping[str, Any]) -> Destination:
    """The family, tensors and config.json of a model.

    Args:
      config: of the model.
      dtype: of the tensors, a name in `WRITTEN`.
      about: other keys of the config.json, as of the one that the model came with.

    Raises:
      ValueError: naming the keys that no family expresses.
    """
    family, tree = configs.write(config, about.get("model_type"))
    lines = names.lines_of(family, config, names.shapes_of(model_shapes(config)))
    # Both names: `dtype` since transformers 5, `torch_dtype` before.
    kind = {"dtype": dtype, "torch_dtype": dtype}
    others = {key: value for key, value in about.items() if key not in _SAID_ANEW}
    return Destination({**others, **tree, **kind}, lines, names.tensor_shapes(lines), dtype)


def save(
    destination: Destination,
    read: Read,
    directory: Path,
    line: ProgressLine,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors files.

    Args:
      destination: from `describe`.
      read: gets a part of one of our arrays by its path; each part is asked for once.
      directory: exists and is empty.
      line: shows how many of the tensors have been written.
      shard_bytes: the most that a file may have, unless a single tensor has more.

    Raises:
      OSError: naming the file, if one cannot be written.
    """
    places = {name: (one, e) for one in destination.lines for e, name in enumerate(one.names())}
    line.add(0)

    def blocks(name: str) -> Iterator[np.ndarray]:
        one, e = places[name]
        yield from _blocks(read, one, (slice(e, e + 1),) if one.tensor.by_expert else ())
        line.add(1 / len(one.names()))

    Writer(directory, destination.shapes, destination.dtype, shard_bytes).write(blocks)
    json_files.write(directory / CONFIG, destination.tree)
    line.close()


def _blocks(read: Read, one: Line, expert: Index) -> Iterator[np.ndarray]:
    """A tensor of a line (an expert's) in parts that follow each other in memory."""
    shapes = [shape[len(expert) :] for shape in one.shapes]

    def part(source: Source, piece: Index) -> np.ndarray:
        layer = () if source.index is None else (slice(source.index, source.index + 1),)
        block = read(source.path, (*layer, *expert, *piece))
        return block.reshape(block.shape[len(layer) + len(expert) :])

    if one.tensor.along == 0:  # one array behind the other
        for source, shape in zip(one.sources, shapes, strict=True):
            for piece in pieces(shape):
                yield part(source, piece)
        return
    for rows in side_by_side(shapes):
        yield one.tensor.join(list(map(part, one.sources, rows)))
