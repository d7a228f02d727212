"""The tensors that a checkpoint of a model must have, and which of our arrays each one holds.

Shapes: L layers of a stack, E routed experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

import jax
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.hf import tables
from dsmoe_jax.hf.families import FAMILIES
from dsmoe_jax.hf.files import DTYPES_WITH_SCALES, SCALE, Checkpoint, named
from dsmoe_jax.hf.tables import Table
from dsmoe_jax.hf.tensors import Index, Read, Tensor, pieces
from dsmoe_jax.model.build import ModelState
from dsmoe_jax.model.layout import places

_HEAD = "lm_head.weight"
_LAYER = "model.layers.{}."
# Older checkpoints have the frequencies of the rotation, which are computed.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")

Shapes = dict[str, tuple[int, ...]]  # of our arrays by path


class Source(NamedTuple):
    """One of our arrays, or one layer of it: its path, and the place in its leading axis."""

    path: str
    index: int | None


class Line(NamedTuple):
    """A tensor of one layer (of each expert), under its full name, and what it holds.

    Attributes:
      tensor: with the full name.
      sources: our arrays, in the order of `tensor.ours`.
      shapes: those of one layer.
    """

    tensor: Tensor
    sources: tuple[Source, ...]
    shapes: tuple[tuple[int, ...], ...]

    def names(self) -> list[str]:
        """Full names of the tensors."""
        return self.tensor.names(self.shapes)


class Missing(ValueError):
    """Arrays of ours that no tensor of a family holds."""


def path_of(path: tuple) -> str:
    """The path of an array of a `ModelState`: "layers/moe/gate_EFD"."""
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    return name.partition("/")[2]


def shapes_of(state: ModelState) -> Shapes:
    """The shapes of all arrays of a model by path."""
    return {path_of(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(state)}


def lines_of(
    family: str, config: ModelConfig, shapes: Shapes, there: Collection[str] = ()
) -> list[Line]:
    """The tensors of a model, in the order of its layers.

    Args:
      family: its name in `FAMILIES`.
      config: of the model.
      shapes: of its arrays.
      there: the names that a checkpoint has, which decide between the tables of a family; none:
        the names that are written.

    Raises:
      Missing: naming arrays that the family has no tensor for.
    """
    table = _table(FAMILIES[family].layers, there)
    lines = list(_lines(tables.MODEL, "", "", None, shapes))
    for layer, place in enumerate(places(config)):
        at = "".join(f"{part}/" for part in place.path)
        lines += _lines(table, _LAYER.format(layer), at, place.index, shapes)
    for module in range(config.mtp_depth):
        prefix = _LAYER.format(config.num_hidden_layers + module)
        lines += _lines(tables.AHEAD, prefix, "mtp/", module, shapes)
        lines += _lines(table, prefix, "mtp/block/", module, shapes)
    held = {source.path for line in lines for source in line.sources}
    if missing := [path for path in shapes if path not in held]:
        raise Missing(f"{FAMILIES[family].architecture} has no tensor for {named(missing)}")
    return lines


def _table(choices: tuple[Table, ...], there: Collection[str]) -> Table:
    """The table of a family whose names a checkpoint has most of."""
    endings = [{tensor.theirs.partition("{E}")[0] for tensor in table} for table in choices]
    if len(choices) == 1 or not there:
        return choices[0]
    inside = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in there}
    counts = [sum(any(n.startswith(e) for n in inside) for e in names) for names in endings]
    return choices[int(np.argmax(counts))]


def _lines(table: Table, prefix: str, at: str, index: int | None, shapes: Shapes) -> Iterator[Line]:
    """The lines of a table whose arrays a layer (or the model) has."""
    for tensor in table:
        paths = [at + path for path in tensor.ours]
        if not all(path in shapes for path in paths):
            continue
        of_layer = tuple(shapes[path] if index is None else shapes[path][1:] for path in paths)
        sources = tuple(Source(path, index) for path in paths)
        yield Line(tensor._replace(theirs=prefix + tensor.theirs), sources, of_layer)


def tensor_shapes(lines: list[Line]) -> Shapes:
    """The shape of every tensor by its name."""
    return {name: line.tensor.shape(line.shapes) for line in lines for name in line.names()}


def has_modules_ahead(config: ModelConfig, there: Collection[str]) -> bool:
    """Whether a checkpoint has tensors behind the last layer, of modules of `model.mtp`."""
    prefix = _LAYER.format(config.num_hidden_layers)
    return any(name.startswith(prefix) for name in there)


def check(checkpoint: Checkpoint, lines: list[Line], config: ModelConfig) -> None:
    """Compares the names and shapes of a checkpoint with those that its model must have.

    Raises:
      ValueError: naming all tensors that are missing, too many or of another shape (some of them,
        where there are many).
    """
    wanted = tensor_shapes(lines)
    there = checkpoint.shapes
    wanted |= {name + SCALE: checkpoint.scale_shape(name) for name in _scaled(checkpoint, wanted)}
    missing = [name for name in wanted if name not in there]
    wrong = [
        f"{name} is {there[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in there and there[name] != shape
    ]
    extra = [name for name in there if name not in wanted and not _is_copy(name, config)]
    problems = [
        f"{len(names)} {what}: {named(names)}"
        for what, names in (("missing", missing), ("too many", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{checkpoint.directory}: tensors {'; '.join(problems)}")


def _is_copy(name: str, config: ModelConfig) -> bool:
    """Whether a tensor that is not wanted says nothing new, or can be computed."""
    if name == _HEAD:  # it is wanted, unless the head is tied
        return True
    ahead = _layer_number(name) >= config.num_hidden_layers
    return bool(_BUFFERS.search(name)) or (ahead and name.endswith(tables.COPIES))


def _scaled(checkpoint: Checkpoint, wanted: Shapes) -> list[str]:
    """Tensors that must have scales: those in 8 bits, and those that have them."""
    there = [name for name in wanted if name in checkpoint.shapes]
    return [
        name
        for name in there
        if checkpoint.dtype(name) in DTYPES_WITH_SCALES or checkpoint.is_scaled(name)
    ]


def _layer_number(name: str) -> int:
    """The number of the layer of a tensor; -1 if it is of none."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def reading(lines: list[Line]) -> dict[str, list[tuple[Line, int]]]:
    """For each of our arrays its tensors, by place in its leading axis, and its part of each."""
    found: dict[str, list[tuple[Line, int]]] = {}
    for line in lines:
        for part, source in enumerate(line.sources):
            found.setdefault(source.path, []).append((line, part))
            assert source.index in (None, len(found[source.path]) - 1)
    return found


def read_block(
    read: Read, tensors: list[tuple[Line, int]], stacked: bool, index: Index, out: np.ndarray
) -> None:
    """Fills a block of one of our arrays.

    Args:
      read: gets a block of a tensor.
      tensors: of the array, from `reading`.
      stacked: whether the array has a leading layer axis.
      index: the block, a slice of each axis.
      out: takes the block.
    """
    if not stacked:
        _read_pieces(read, tensors[0], index, out)
        return
    layers, *rest = index
    for i, layer in enumerate(range(*layers.indices(len(tensors)))):
        _read_pieces(read, tensors[layer], tuple(rest), out[i, ...])


def _read_pieces(read: Read, tensor: tuple[Line, int], index: Index, out: np.ndarray) -> None:
    """Fills a block of an array without layers, piece by piece: no tensor is held as a whole."""
    line, part = tensor
    for piece in pieces(out.shape):
        moved = [
            slice(at.start + inner.start, at.start + inner.stop)
            for at, inner in zip(index, piece, strict=True)
        ]
        out[piece] = line.tensor.read(read, part, line.shapes, tuple(moved))
