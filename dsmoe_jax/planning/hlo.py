"""Reads the text of a compiled program: traffic between devices, and computation meanwhile.

The text is that of `jax.stages.Compiled.as_text()`: computations of one instruction a line, in the
order in which they run.  The condition of a `while` (the layers, the micro-batches) compares a
counter that starts at 0 with a constant: the number of times that its body runs.

Bytes that a chip receives in a collective over g devices, whose operand has b bytes:

    all-gather          b (g - 1)          reduce-scatter, all-to-all   b (g - 1) / g
    all-reduce          2 b (g - 1) / g    collective-permute           b
    ragged-all-to-all   at most m (g - 1) / g, m the smaller of what can be sent and received
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:true_computation|false_computation)=%?([\w.\-]+)")
_BRANCH_LIST = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
# {{0,1},{2,3}} or [2,2]<=[4] or mesh['a'=2,'b'=2] {'a'}: groups over the axis a
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})"
)
_AXIS = re.compile(r"('\w+')=(\d+)")
_BITS = {"pred": 8, "bf16": 16, "token": 0}

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
EXCHANGES = ("all-to-all", "ragged-all-to-all")
_PRODUCTS = ("dot", "convolution")  # on a TPU a dot is a convolution
_COMPUTE = ("fusion", *_PRODUCTS, "custom-call", "while", "call")


class Instruction(NamedTuple):
    """A line of the text: `name = type opcode(arguments), attributes`."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results are its arguments."""
        return _OPERAND.findall(self.arguments)


class Traffic(NamedTuple):
    """A collective of the program.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: received by a chip each time (see the module's docstring).
      times: number of its runs in one run of the program.
    """

    kind: str
    bytes: float
    times: int


class Overlap(NamedTuple):
    """Numbers of exchanges of tokens, by the instructions between their start and their end.

    Attributes:
      exchanges: all in the program; one in a loop counts once.
      asynchronous: those that have a start and an end.
      with_compute: those with computations in between.
      with_shared_experts: those with matrix products of the shared experts in between.
    """

    exchanges: int
    asynchronous: int
    with_compute: int
    with_shared_experts: int


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of its entry computation."""
    computations: dict[str, list[Instruction]] = {}
    current = None
    entry = ""
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = []
            computations[header[1]] = current
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            name, kind, opcode, rest = match.groups()
            end = _closing(rest)
            current.append(Instruction(name, kind, opcode, rest[:end], rest[end:]))
    return computations, entry


def _closing(text: str) -> int:
    """The position of the parenthesis that closes one just before `text`."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)


def n_bytes(kind: str) -> float:
    """Bytes of a type, without padding: `bf16[8,128]{1,0}` or a tuple of such."""
    total = 0.0
    for dtype, shape in _ARRAY.findall(kind):
        bits = _BITS.get(dtype, int(re.sub(r"\D", "", dtype) or 0))
        total += bits / 8 * math.prod(int(n) for n in shape.split(",") if n)
    return total


def traffic(text: str) -> list[Traffic]:
    """Every collective of a program.

    In a conditional only the branch that moves least is counted: the other branch exchanges in
    chunks, and runs only when the buffer of `buffer_factor` is too small.

    Raises:
      ValueError: for a loop around a collective whose condition gives no number of times.
    """
    computations, entry = parse(text)

    def collectives_in(name: str) -> Iterator[Traffic]:
        instructions = computations.get(name, [])
        types = {i.name: i.type for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            called = _CALLED.search(i.attributes)
            if kind in COLLECTIVES:
                if name.startswith("all-reduce-scatter"):  # a TPU's name of a reduce-scatter
                    kind = "reduce-scatter"
                yield Traffic(kind, _received(kind, i, types), times=1)
            elif i.opcode == "while" and (body := _BODY.search(i.attributes)):
                inside = list(collectives_in(body[1]))
                trips = _trips(i, computations) if inside else 0
                yield from (t._replace(times=t.times * trips) for t in inside)
            elif i.opcode == "conditional":
                branches = [list(collectives_in(branch)) for branch in _branches(i)]
                yield from min(branches, key=lambda b: sum(t.bytes * t.times for t in b))
            elif called and not _is_continued(i, called[1]):
                yield from collectives_in(called[1])

    return list(collectives_in(entry))


def _is_continued(i: Instruction, called: str) -> bool:
    """Whether a fusion continues a collective that `async-collective-start` has begun."""
    return i.name.startswith("async-collective-done") or called.startswith(
        "async_collective_fusion"
    )


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """The number of times that a loop runs: n of its condition `counter < n`.

    Raises:
      ValueError: for any other condition.
    """
    condition = _CONDITION.search(loop.attributes)
    instructions = computations.get(condition[1], []) if condition else []
    constants = {i.name: i.arguments for i in instructions if i.opcode == "constant"}
    for i in instructions:
        if i.opcode == "compare" and "direction=LT" in i.attributes:
            for name in i.operands:
                if name in constants:
                    return int(constants[name])
    raise ValueError(f"{loop.name}: its condition does not say how often it runs")


def _branches(conditional: Instruction) -> list[str]:
    if listed := _BRANCH_LIST.search(conditional.attributes):
        return _OPERAND.findall(listed[1])
    return _BRANCHES.findall(conditional.attributes)


def _received(kind: str, i: Instruction, types: dict[str, str]) -> float:
    """Bytes that a chip receives in one collective."""
    g = _group_size(i.attributes)
    sizes = [n_bytes(types[name]) for name in i.operands if name in types]
    share = (g - 1) / g
    if kind == "ragged-all-to-all":
        return min(sizes[:2]) * share
    if kind == "collective-permute":
        return sizes[0]
    factor = {"all-gather": g - 1, "all-reduce": 2 * share}.get(kind, share)
    return sum(sizes) * factor


def _group_size(attributes: str) -> int:
    """Number of devices in a group of a collective."""
    if (groups := _GROUPS.search(attributes)) is None:
        return 1
    listed, counted, axes, chosen = groups.groups()
    if listed is not None:
        return len(listed.split(","))
    if counted is not None:
        return int(counted)
    sizes = {name: int(n) for name, n in _AXIS.findall(axes)}
    return math.prod(sizes[name] for name in chosen.split(","))


def by_kind(all_traffic: list[Traffic]) -> dict[str, float]:
    """GB that a chip receives in one run of the program, by kind of collective."""
    total: dict[str, float] = collections.defaultdict(float)
    for t in all_traffic:
        total[t.kind] += t.bytes * t.times / 1e9
    return {kind: total[kind] for kind in COLLECTIVES if kind in total}


def overlap(text: str, scope: str = "shared_experts") -> Overlap:
    """Counts the exchanges, and those that the schedule overlaps with computation.

    Args:
      text: of a scheduled program.
      scope: `jax.named_scope` of the shared experts.
    """
    computations, _ = parse(text)
    exchanges = 0
    asynchronous = 0
    with_compute = 0
    with_shared_experts = 0
    for instructions in computations.values():
        ends = {o: n for n, i in enumerate(instructions) if "-done" in i.opcode for o in i.operands}
        for n, i in enumerate(instructions):
            if i.opcode.removesuffix("-start") not in EXCHANGES:
                continue
            between = instructions[n + 1 : ends[i.name]] if i.name in ends else []
            compute = [b for b in between if b.opcode in _COMPUTE]
            exchanges += 1
            asynchronous += i.opcode.endswith("-start")
            with_compute += bool(compute)
            with_shared_experts += any(_multiplies(b, scope, computations) for b in compute)
    return Overlap(exchanges, asynchronous, with_compute, with_shared_experts)


def _multiplies(i: Instruction, scope: str, computations: dict[str, list[Instruction]]) -> bool:
    """Whether an instruction is a matrix product of a scope, or a fusion around one."""
    if i.opcode in _PRODUCTS and f"/{scope}/" in i.attributes:
        return True
    called = _CALLED.search(i.attributes)
    inside = computations.get(called[1], []) if called else []
    return any(_multiplies(j, scope, computations) for j in inside)
