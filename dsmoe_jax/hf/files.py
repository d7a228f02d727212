"""The safetensors files of a checkpoint: reading blocks of tensors, writing shards.

Only the rows that are asked for are read.  Numbers come out as float32, whatever they are stored
in; tensors in 8 bits (V3, 2412.19437 section 3.3) are multiplied by the scales of their blocks,
`NAME_scale_inv`, one for 128 x 128 numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsmoe_jax.hf.tensors import Index
from dsmoe_jax.runs import json_files

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"  # of a tensor in 8 bits: its name with this
SCALE_BLOCK = 128
_ALIGNMENT = 8  # of the first tensor in a file that we write, in bytes

# By the name in a file.  Reading is left to numpy: the library itself knows no float8 there, and
# the pages that it maps would count as memory.
DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
DTYPES_WITH_SCALES = ("F8_E4M3",)
WRITTEN = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class _Place(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """The tensors in the safetensors files of a directory.

    Args:
      directory: with `model.safetensors`, or with shards and their index.

    Raises:
      ValueError: if there are none, or one of them is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files = _files(directory)
        self._places: dict[str, _Place] = {}
        for path in self.files:
            self._places |= _places(path)
        self.shapes = {name: place.shape for name, place in self._places.items()}

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file."""
        return max(path.stat().st_size for path in self.files)

    def dtypes(self) -> list[str]:
        """The names of the dtypes that are there."""
        return sorted({place.dtype for place in self._places.values()})

    def dtype(self, name: str) -> str:
        """The name of the dtype of a tensor."""
        return self._places[name].dtype

    def is_scaled(self, name: str) -> bool:
        """Whether a tensor is to be multiplied by the scales of its blocks."""
        return name + SCALE in self._places

    def scale_shape(self, name: str) -> tuple[int, ...]:
        """The shape that the scales of a tensor must have."""
        return tuple(-(-size // SCALE_BLOCK) for size in self.shapes[name])

    def read(self, name: str, index: Index) -> np.ndarray:
        """A block of a tensor, float32.

        Args:
          name: of the tensor.
          index: a slice of each dimension, without steps.
        """
        block = self._read_raw(name, index).astype(np.float32)
        if not self.is_scaled(name):
            return block
        bounds = [at.indices(size)[:2] for at, size in zip(index, self.shapes[name], strict=True)]
        coarse = [slice(a // SCALE_BLOCK, -(-b // SCALE_BLOCK)) for a, b in bounds]
        scale = self._read_raw(name + SCALE, tuple(coarse)).astype(np.float32)
        for axis, (a, b) in enumerate(bounds):
            of_each = np.arange(a, b) // SCALE_BLOCK - a // SCALE_BLOCK
            scale = scale.take(of_each, axis=axis)
        return block * scale

    def _read_raw(self, name: str, index: Index) -> np.ndarray:
        place = self._places[name]
        dtype = np.dtype(DTYPES[place.dtype])
        if not place.shape:
            return np.fromfile(place.path, dtype, 1, offset=place.offset).reshape(())
        # Behind leading axes of one element each, what is asked for lies in rows.
        sizes = [len(range(*at.indices(n))) for at, n in zip(index, place.shape, strict=True)]
        axis = next((i for i, n in enumerate(sizes) if n != 1), len(sizes) - 1)
        offset = place.offset
        for i in range(axis + 1):
            start = index[i].indices(place.shape[i])[0]
            offset += start * math.prod(place.shape[i + 1 :]) * dtype.itemsize
        size = sizes[axis] * math.prod(place.shape[axis + 1 :])
        rows = np.fromfile(place.path, dtype, size, offset=offset)
        if rows.size != size:
            raise ValueError(f"{place.path}: ends within the tensor {name}")
        rows = rows.reshape(*sizes[: axis + 1], *place.shape[axis + 1 :])
        return rows[(*[slice(None)] * (axis + 1), *index[axis + 1 :])]


def _files(directory: Path) -> list[Path]:
    """The files of a checkpoint, all of them there."""
    if (directory / INDEX).is_file():
        tree = json_files.read(directory / INDEX)
        weight_map = tree.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{directory / INDEX}: has no weight_map")
        paths = sorted({directory / str(name) for name in weight_map.values()})
    elif (directory / WEIGHTS).is_file():
        paths = [directory / WEIGHTS]
    else:
        raise ValueError(f"{directory}: holds no weights (neither {WEIGHTS} nor {INDEX})")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{directory}: {named(missing)} of {INDEX} missing")
    return paths


def _places(path: Path) -> dict[str, _Place]:
    """Places of the tensors in a file; the library sees to it that the file is whole."""
    safetensors = library()
    try:
        with safetensors.safe_open(path, "np"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    header.pop("__metadata__", None)
    places = {}
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name} is of dtype {about['dtype']}; must be one of {sorted(DTYPES)}"
            )
        offset = 8 + length + about["data_offsets"][0]
        places[name] = _Place(path, about["dtype"], tuple(about["shape"]), offset)
    return places


def library() -> Any:
    """The library of the files.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ValueError(
            "conversion needs the library safetensors: pip install 'dsmoe_jax[hf]'"
        ) from error
    return safetensors


def named(names: Iterable[str], most: int = 8) -> str:
    """A list of names for an error, cut after some."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class Writer:
    """Writes tensors into `model.safetensors`, or into shards of limited size with an index.

    Nothing is held: the header of a file says where its tensors lie before the first one is there.

    Args:
      directory: exists.
      shapes: of the tensors by name, in the order in which they are added.
      dtype: of all of them, a name in `WRITTEN`.
      shard_bytes: the most that a shard may have, unless a single tensor has more.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int
    ):
        self.directory = directory
        self._shapes = shapes
        self._dtype = WRITTEN[dtype]
        self._sizes = sizes_of(shapes, dtype)
        self._shards = [names for names, _ in _shards(self._sizes, shard_bytes)]

    def write(self, blocks: Callable[[str], Iterable[np.ndarray]]) -> None:
        """Writes all files.

        Args:
          blocks: of a tensor by its name: parts that follow each other in memory, in any dtype.

        Raises:
          OSError: naming the file that cannot be written.
        """
        count = len(self._shards)
        places = {}
        for number, names in enumerate(self._shards, start=1):
            file = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            places |= dict.fromkeys(names, file)
            try:
                self._write_file(self.directory / file, names, blocks)
            except OSError as error:
                raise OSError(f"{self.directory / file}: cannot be written: {error}") from error
        if count > 1:
            tree = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": places}
            json_files.write(self.directory / INDEX, tree)

    def _write_file(
        self, path: Path, names: list[str], blocks: Callable[[str], Iterable[np.ndarray]]
    ) -> None:
        with open(path, "wb") as file:
            file.write(self._header(names))
            for name in names:
                start = file.tell()
                for block in blocks(name):
                    file.write(
                        block.astype(self._dtype, copy=False).reshape(-1).view(np.uint8).data
                    )
                assert file.tell() - start == self._sizes[name], name

    def _header(self, names: list[str]) -> bytes:
        """The beginning of a file: the length of its table, and the table, as JSON."""
        kind = next(kind for kind, dtype in DTYPES.items() if self._dtype == dtype)
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            end = at + self._sizes[name]
            shape = list(self._shapes[name])
            table[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def sizes_of(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, int]:
    """Bytes of tensors by name, if they are written in a dtype."""
    itemsize = WRITTEN[dtype].itemsize
    return {name: math.prod(shape) * itemsize for name, shape in shapes.items()}


def largest_shard(sizes: dict[str, int], shard_bytes: int) -> int:
    """Bytes of the largest file that tensors of these sizes are written to."""
    return max(size for _, size in _shards(sizes, shard_bytes))


def _shards(sizes: dict[str, int], shard_bytes: int) -> list[tuple[list[str], int]]:
    """Names and bytes of each shard, in order."""
    shards: list[tuple[list[str], int]] = []
    for name, size in sizes.items():
        if not shards or shards[-1][1] + size > shard_bytes:
            shards.append(([], 0))
        names, so_far = shards[-1]
        names.append(name)
        shards[-1] = (names, so_far + size)
    return shards


def sync(directory: Path) -> None:
    """Waits until the entries of a directory are on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
