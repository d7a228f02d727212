"""Traffic between the devices of a compiled program, and computation meanwhile.

Bytes that a chip receives in a collective over g devices, whose operand has b bytes:

    all-gather          b (g - 1)          reduce-scatter, all-to-all   b (g - 1) / g
    all-reduce          2 b (g - 1) / g    collective-permute           b
    ragged-all-to-all   at most m (g - 1) / g, m the smaller of what can be sent and received

What comes from other slices is no collective in the program: the hosts exchange it, and the chip
has a `recv` from its host, whose bytes count as "between slices".
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from dsmoe_jax.planning.hlo import COLLECTIVES, Instruction, arrays, n_bytes, parse

# {{0,1},{2,3}} or [2,2]<=[4] or mesh['a'=2,'b'=2] {'a'}: groups over the axis a
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})"
)
_AXIS = re.compile(r"('\w+')=(\d+)")
EXCHANGES = ("all-to-all", "ragged-all-to-all")
BETWEEN_SLICES = "between slices"
_FROM_HOST = "xla_megascale"  # the runtime of several slices, in the attributes of a `recv`
_PRODUCTS = ("dot", "convolution")  # on a TPU a dot is a convolution
_COMPUTE = ("fusion", *_PRODUCTS, "custom-call", "while", "call")


class Traffic(NamedTuple):
    """A collective of the program.

    Attributes:
      kind: one of `COLLECTIVES`, or `BETWEEN_SLICES`.
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


def traffic(text: str) -> list[Traffic]:
    """Every collective of a program.

    Of the branches of a conditional the one that moves most is counted.

    Raises:
      ValueError: for a loop around a collective whose condition gives no number of times.
    """
    program = parse(text)

    def collectives_in(name: str) -> Iterator[Traffic]:
        instructions = program.computations.get(name, [])
        types = {i.name: i.type for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                if name.startswith("all-reduce-scatter"):  # a TPU's name of a reduce-scatter
                    kind = "reduce-scatter"
                yield Traffic(kind, _received(kind, i, types), times=1)
            elif kind == "recv" and _FROM_HOST in i.attributes:
                array, *_ = arrays(i.type)  # then a context and a token
                yield Traffic(BETWEEN_SLICES, array.bytes, times=1)
            elif i.opcode == "while":
                inside = list(collectives_in(i.body))
                trips = program.trips(i)
                if inside and trips is None:
                    raise ValueError(f"{i.name}: its condition does not say how often it runs")
                yield from (t._replace(times=t.times * (trips or 0)) for t in inside)
            elif i.opcode == "conditional":
                branches = [list(collectives_in(b)) for b in program.branches(i)]
                yield from max(branches, key=lambda b: sum(t.bytes * t.times for t in b))
            elif i.called and not _is_continued(i):
                yield from collectives_in(i.called)

    return list(collectives_in(program.entry))


def _is_continued(i: Instruction) -> bool:
    """Whether a fusion continues a collective that `async-collective-start` has begun."""
    return i.name.startswith("async-collective-done") or i.called.startswith(
        "async_collective_fusion"
    )


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
    return {kind: total[kind] for kind in (*COLLECTIVES, BETWEEN_SLICES) if kind in total}


def overlap(text: str, scope: str = "shared_experts") -> Overlap:
    """Counts the exchanges, and those that the schedule overlaps with computation.

    Args:
      text: of a scheduled program.
      scope: `jax.named_scope` of the shared experts.
    """
    computations = parse(text).computations
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
    inside = computations.get(i.called, [])
    return any(_multiplies(j, scope, computations) for j in inside)
