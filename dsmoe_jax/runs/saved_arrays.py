"""Arrays of a checkpoint, read part by part: none of them is ever held as a whole.

Orbax writes a tree as zarr arrays in a single store of files, which tensorstore opens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from dsmoe_jax.runs.digests import digest_of_part
from dsmoe_jax.storage.places import is_address

Index = tuple[slice, ...]


def name_of(path: tuple) -> str:
    """The name of an array in a checkpoint, from its path in the tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


class SavedArrays:
    """The arrays of an item of a checkpoint on disk.

    Args:
      directory: of the item.
      shapes: of the tree, as it was saved.
      digests: of its arrays (runs/digests.py), in the order of the tree.

    Attributes:
      held_bytes: what reading holds at most, beside what it returns.

    Raises:
      ValueError: if an array is missing or has another shape.
    """

    def __init__(self, directory: Path, shapes: Any, digests: Sequence[int]):
        wanted = {name_of(path): x for path, x in jax.tree.leaves_with_path(shapes)}
        self._digests = dict(zip(wanted, digests, strict=True))
        self._found = dict.fromkeys(wanted, 0)
        opened = {name: _open(directory, name) for name in wanted}
        for name, x in wanted.items():
            if (shape := tuple(opened[name].shape)) != x.shape:
                raise ValueError(f"{name} is {shape}, not {x.shape}")
        slab = max(_slab_bytes(array) for array in opened.values())
        # Tensors may take turns between two arrays; a third slab is being decompressed.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 2 * slab}})
        self._arrays = {name: _open(directory, name, context) for name in wanted}
        self.held_bytes = 3 * slab

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of an array.

        Args:
          name: of the array, from `name_of`.
          index: a slice of each axis, such that the part lies in one piece in row-major order.
        """
        array = self._arrays[name]
        part = np.asarray(array[index].read().result())
        offset = 0
        for at, size in zip(index, array.shape, strict=True):
            offset = offset * size + at.start
        self._found[name] = (self._found[name] + digest_of_part(part, offset)) % 2**32
        return part

    def check(self) -> None:
        """Compares the digests, once everything has been read.

        Raises:
          ValueError: if an array is not what was saved.
        """
        if self._found != self._digests:
            raise ValueError("an array is not what was saved")


def _open(directory: Path, name: str, context: ts.Context | None = None) -> Any:
    base = str(directory) if is_address(directory) else f"file://{directory.resolve()}"
    store = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": "open"}
    return ts.open(spec, context=context or ts.Context(), open=True, read=True).result()


def _slab_bytes(array: Any) -> int:
    """Bytes of the chunks that a row of an array lies in."""
    chunk = array.chunk_layout.read_chunk.shape
    axis = next((i for i, n in enumerate(chunk) if n > 1), len(chunk))
    elements = math.prod(chunk[: axis + 1]) * math.prod(array.shape[axis + 1 :])
    return elements * array.dtype.numpy_dtype.itemsize
