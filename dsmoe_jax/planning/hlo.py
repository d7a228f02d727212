"""Reads the text of a compiled program: its instructions, its loops, the bytes of its arrays.

The text is that of `jax.stages.Compiled.as_text()`: computations of one instruction a line, in the
order in which they run.  The condition of a `while` (the layers, the micro-batches) compares a
counter that starts at 0 with a constant: the number of times that its body runs.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from dsmoe_jax.moe.blocks import USUAL_TRIPS

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
# bf16[8,128]{1,0:T(8,128)(2,1)S(1)}: dtype, shape, dimensions from minor to major, tiles and space
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"\bS\(\d+\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:true_computation|false_computation)=%?([\w.\-]+)")
_BRANCH_LIST = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_WORD = re.compile(r"\w+")
_BITS = {"pred": 8, "bf16": 16, "token": 0}

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


class Array(NamedTuple):
    """An array of a type.

    Attributes:
      elements: their number.
      bytes: without padding.
      padded: bytes of whole tiles, if the layout has tiles.
      in_hbm: whether it lives in the chip's main memory: its layout names no other space (`S(1)` is
        a TPU's VMEM).
    """

    elements: int
    bytes: float
    padded: float
    in_hbm: bool


class Instruction(NamedTuple):
    """A line of the text: `name = type opcode(arguments), attributes`."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results are its arguments."""
        return _OPERAND.findall(self.arguments)

    @property
    def called(self) -> str:
        """The computation that a fusion or a call runs; "" without one."""
        called = _CALLED.search(self.attributes)
        return called[1] if called else ""

    @property
    def body(self) -> str:
        """The computation that a `while` repeats."""
        body = _BODY.search(self.attributes)
        return body[1] if body else ""

    @property
    def words(self) -> list[str]:
        """The words of its `op_name`, outermost first: names of scopes and of operations."""
        name = _OP_NAME.search(self.attributes)
        return _WORD.findall(name[1]) if name else []


class Program:
    """A program.

    Attributes:
      computations: lists of instructions by name.
      entry: the name of the computation that runs first.
    """

    def __init__(self, computations: dict[str, list[Instruction]], entry: str):
        self.computations = computations
        self.entry = entry

    def trips(self, loop: Instruction) -> int | None:
        """The number of times that a loop runs: n of its condition `counter < n`.

        Of a loop whose data decide it, that of a balanced load, if its scope says so
        (`blocks.USUAL_TRIPS`); None for any other.
        """
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        condition = _CONDITION.search(loop.attributes)
        instructions = self.computations.get(condition[1], []) if condition else []
        constants = {
            i.name: i.arguments
            for i in instructions
            if i.opcode == "constant" and i.type.startswith(("s", "u"))
        }
        for i in instructions:
            if i.opcode == "compare" and "direction=LT" in i.attributes:
                for name in i.operands:
                    if name in constants:
                        return int(constants[name])
        usual = [word for word in loop.words if word.startswith(USUAL_TRIPS)]
        return int(usual[-1].removeprefix(USUAL_TRIPS)) if usual else None

    def branches(self, conditional: Instruction) -> list[str]:
        """The names of a conditional's branches."""
        if listed := _BRANCH_LIST.search(conditional.attributes):
            return _OPERAND.findall(listed[1])
        return _BRANCHES.findall(conditional.attributes)


def parse(text: str) -> Program:
    """The program of a text."""
    computations: dict[str, list[Instruction]] = {}
    current = None
    entry = ""
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = []
            computations[header[1]] = current
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, kind, opcode, rest = match.groups()
            end = _closing(rest)
            current.append(
                Instruction(name, kind, opcode, rest[:end], rest[end:], is_root=root is not None)
            )
    return Program(computations, entry)


def _closing(text: str) -> int:
    """The position of the parenthesis that closes one just before `text`."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)


@functools.cache
def arrays(kind: str) -> list[Array]:
    """The arrays of a type: one, or those of a tuple, nested ones after each other."""
    return list(_arrays(kind))


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, shape, order, layout in _ARRAY.findall(kind):
        lengths = [int(n) for n in shape.split(",") if n]
        n = math.prod(lengths)
        bits = _BITS.get(dtype, int(re.sub(r"\D", "", dtype) or 0))
        padded = math.prod(_whole_tiles(lengths, order, layout))
        yield Array(n, bits / 8 * n, bits / 8 * padded, _SPACE.search(layout) is None)


def _whole_tiles(lengths: list[int], order: str, layout: str) -> list[int]:
    """The lengths from major to minor, rounded up to whole tiles."""
    tile = _TILE.search(layout)
    if tile is None or not order:
        return lengths
    major_to_minor = [lengths[int(d)] for d in reversed(order.split(","))]
    sides = [int(n) for n in tile[1].split(",")]
    for i, side in enumerate(sides[::-1][: len(lengths)], 1):
        major_to_minor[-i] += -major_to_minor[-i] % side
    return major_to_minor


def n_bytes(kind: str) -> float:
    """Bytes of a type, without padding: `bf16[8,128]{1,0}` or a tuple of such."""
    return sum(array.bytes for array in arrays(kind))
