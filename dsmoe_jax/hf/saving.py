"""From a model of ours to the directory of a Hugging Face one, shard by shard.

Shapes: L layers of a stack, E routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.hf import configs, names
from dsmoe_jax.hf.files import WRITTEN, Writer
from dsmoe_jax.hf.loading import CONFIG
from dsmoe_jax.hf.names import Line, Source
from dsmoe_jax.model.build import ModelState, model_shapes
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
      sizes: bytes of each tensor, in order.
      dtype: of the tensors, a name in `WRITTEN`.
    """

    tree: dict[str, Any]
    lines: list[Line]
    sizes: dict[str, int]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes.values())


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
    itemsize = WRITTEN[dtype].itemsize
    sizes = {
        name: math.prod(shape) * itemsize for name, shape in names.tensor_shapes(lines).items()
    }
    # Both names: `dtype` since transformers 5, `torch_dtype` before.
    kind = {"dtype": dtype, "torch_dtype": dtype}
    others = {key: value for key, value in about.items() if key not in _SAID_ANEW}
    return Destination({**others, **tree, **kind}, lines, sizes, dtype)


def save(
    destination: Destination,
    state: ModelState,
    directory: Path,
    line: ProgressLine,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors files.

    Args:
      destination: from `describe`.
      state: the arrays of the model.
      directory: exists and is empty.
      line: shows how many of the tensors have been written.
      shard_bytes: the most that a file may have, unless a single tensor has more.

    Raises:
      OSError: naming the file, if one cannot be written.
    """
    arrays = {names.path_of(path): x for path, x in jax.tree.leaves_with_path(state)}
    writer = Writer(directory, destination.sizes, shard_bytes)
    line.add(0)
    for one in destination.lines:
        held = [_layer(arrays, source) for source in one.sources]
        if not one.tensor.by_expert:
            writer.add(one.tensor.theirs, _as(destination.dtype, one.tensor.join(held)))
        else:
            for e, name in enumerate(one.names()):
                whole = one.tensor.join([array[e] for array in held])
                writer.add(name, _as(destination.dtype, whole))
        line.add(1)
    writer.close()
    json_files.write(directory / CONFIG, destination.tree)
    line.close()


def _as(dtype: str, array: np.ndarray) -> np.ndarray:
    return array.astype(WRITTEN[dtype], copy=False)


def _layer(arrays: Mapping[str, jax.Array], source: Source) -> np.ndarray:
    """An array, or one layer of it, in the memory of this process."""
    array = arrays[source.path]
    return np.asarray(array if source.index is None else array[source.index])
