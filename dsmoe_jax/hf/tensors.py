"""Tensors of a checkpoint of Hugging Face, and the arrays of ours that hold the same numbers.

A `Tensor` is a line of a family's table (families.py), and is used in both directions.  No number
is permuted within a head: rotary layouts are a setting of our attention.

Shapes: the letters of parallel/sharding.py; L layers, E routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Index = tuple[slice, ...]
Read = Callable[[str, Index], np.ndarray]  # (name of a tensor, part of it) -> its numbers

PIECE_BYTES = 8 * 2**20  # of an array in float32: what is held of it at a time


def pieces(shape: Sequence[int]) -> Iterator[Index]:
    """Parts of an array that follow each other in memory, in order, of `PIECE_BYTES` at most."""
    if not shape:
        yield ()
        return
    first, *others = shape
    rows = PIECE_BYTES // 4 // max(1, math.prod(others))
    if rows:
        for start in range(0, first, rows):
            yield (slice(start, min(start + rows, first)), *(slice(0, n) for n in others))
        return
    for i in range(first):
        for rest in pieces(others):
            yield (slice(i, i + 1), *rest)


def side_by_side(shapes: Sequence[tuple[int, ...]]) -> Iterator[list[Index]]:
    """The same rows of several arrays, in order, of `PIECE_BYTES` together (but a row at least)."""
    n = shapes[0][0]
    rows = max(1, PIECE_BYTES // 4 // sum(math.prod(shape[1:]) for shape in shapes))
    for start in range(0, n, rows):
        at = slice(start, min(start + rows, n))
        yield [(at, *(slice(0, size) for size in shape[1:])) for shape in shapes]


class Tensor(NamedTuple):
    """A tensor of a checkpoint, in the terms of our arrays of one layer.

    Attributes:
      theirs: its name; {E} is the number of an expert, of which each has a tensor.
      axes: our axes in each of its dimensions, outermost first: "NH D" is (N * H, D).  A "1" is a
        dimension of size one that our array does not have.
      ours: the paths of our arrays that it holds, within their layer.
      along: the number of the axis along which they lie side by side, where there are several.
    """

    theirs: str
    axes: str
    ours: tuple[str, ...]
    along: int = 0

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{E}" in self.theirs

    def names(self, shapes: Sequence[tuple[int, ...]]) -> list[str]:
        """The names of the tensors that hold arrays of these shapes."""
        if not self.by_expert:
            return [self.theirs]
        return [self.theirs.format(E=e) for e in range(shapes[0][0])]

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor (of one expert's) that holds arrays of these shapes."""
        return tuple(math.prod(sizes) for sizes in self._dimensions(self._whole(shapes)))

    def read(
        self, read: Read, part: int, shapes: Sequence[tuple[int, ...]], index: Index
    ) -> np.ndarray:
        """A block of one of our arrays.

        Args:
          read: gets a block of a tensor by its name.
          part: the place of the array in `ours`.
          shapes: of all arrays in `ours`.
          index: the block, a slice of each axis.
        """
        if not self.by_expert:
            return self._read_one(read, self.theirs, part, shapes, index)
        experts, *rest = index
        e = shapes[0][0]
        blocks = [
            self._read_one(read, self.theirs.format(E=i), part, shapes, tuple(rest))
            for i in range(*experts.indices(e))
        ]
        return np.stack(blocks)

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor from our arrays; of one expert, where each has its own."""
        whole = np.concatenate(arrays, axis=self.along) if len(arrays) > 1 else arrays[0]
        return whole.reshape([math.prod(sizes) for sizes in self._dimensions(whole.shape)])

    def _read_one(
        self, read: Read, name: str, part: int, shapes: Sequence[tuple[int, ...]], index: Index
    ) -> np.ndarray:
        whole = self._whole(shapes)
        start = sum(shape[self.along + self.by_expert] for shape in shapes[:part])
        bounds = []
        for axis, (length, at) in enumerate(zip(self._one(shapes[part]), index, strict=True)):
            first, last, _ = at.indices(length)
            moved = start if axis == self.along else 0
            bounds.append((first + moved, last + moved))
        theirs = []
        sizes = []
        inner = []
        for axes in self._axes():
            if not axes:
                theirs.append(slice(0, 1))
                continue
            outer, *others = axes
            first, last = bounds[outer]
            stride = math.prod(whole[axis] for axis in others)
            theirs.append(slice(first * stride, last * stride))
            sizes += [last - first, *(whole[axis] for axis in others)]
            inner += [slice(None), *(slice(*bounds[axis]) for axis in others)]
        return read(name, tuple(theirs)).reshape(sizes)[tuple(inner)]

    def _whole(self, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """Our axes of one tensor, with all arrays that it holds side by side."""
        whole = list(self._one(shapes[0]))
        whole[self.along] = sum(self._one(shape)[self.along] for shape in shapes)
        return whole

    def _one(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of one tensor: those of an array without the experts, if each has its own."""
        return shape[1:] if self.by_expert else shape

    def _axes(self) -> list[list[int]]:
        """The numbers of our axes in each dimension."""
        numbers: Iterator[int] = iter(range(len(self.axes)))
        return [
            [] if letters == "1" else [next(numbers) for _ in letters]
            for letters in self.axes.split()
        ]

    def _dimensions(self, sizes: Sequence[int]) -> list[list[int]]:
        return [[sizes[axis] for axis in axes] for axes in self._axes()]
