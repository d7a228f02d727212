"""Bytes that a compiled program reads from and writes to a chip's main memory (HBM), by scope.

Every instruction that the chip executes reads its operands and writes its result, each once:

- a fusion reads and writes what crosses its border; what is inside stays on the chip;
- a `while` moves what its body moves, times its trips; where the data decide how often it runs,
  those that its scope expects (`blocks.USUAL_TRIPS`), else once (`Move.counted_once`);
- a conditional moves what the branch moves that moves most;
- a dynamic-slice, a slice or a gather reads what it takes, also inside a fusion that does nothing
  else with the operand but element by element;
- a dynamic-update-slice or a scatter of an operand is in place: it reads and writes the update's
  elements, also at the root of a fusion;
- an asynchronous pair reads at its start and writes at its end; a collective that TPUs continue in
  fusions of other work counts at its start;
- a ragged exchange moves no more than the smaller of what can be sent and received;
- arrays in other spaces (VMEM, SMEM, semaphores) are not in HBM.

Bytes are those of whole tiles of the layout.  A kernel that reads an operand more than once, or
only some of its rows, counts as one that reads it once.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dsmoe_jax.planning.hlo import COLLECTIVES, Array, Instruction, Program, arrays, parse

# Names of `jax.named_scope` -> the scope under which their traffic counts.
SCOPES = {
    "attention": "attention",
    "router": "router",
    "dispatch": "dispatch",
    "experts": "experts",
    "shared_experts": "shared_experts",
    "dense_ffn": "shared_experts",  # a feed-forward layer that every token visits
    "head": "head",
    "embedding": "head",
    "optimizer": "optimizer",
    "add_up": "optimizer",  # gradients of micro-batches
}
OTHER = "other"
ALL_SCOPES = (*dict.fromkeys(SCOPES.values()), OTHER)

_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "add-dependency", "opt-barrier", "partition-id", "replica-id",
})  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound")
# Element i of the result needs element i of each operand (or its place in another layout).
_BY_ELEMENT = frozenset({
    "bitcast", "reshape", "transpose", "copy", "convert", "bitcast-convert", "negate", "abs",
    "exponential", "log", "logistic", "tanh", "sqrt", "rsqrt", "power", "sign", "not", "add",
    "subtract", "multiply", "divide", "maximum", "minimum", "and", "or", "xor", "select",
    "compare", "clamp", "get-tuple-element",
})  # fmt: skip
_COUNTED_AT_START = ("async-start", "async-update", "call-start", "ragged-all-to-all-start")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")


class Move(NamedTuple):
    """The traffic of an instruction.

    Attributes:
      name: of the instruction.
      scope: one of `ALL_SCOPES`.
      read: bytes each time.
      written: bytes each time.
      loops: trips of the loops around it, the outermost first.
      counted_once: whether one of them runs as often as the data wants, and counts as one trip.
    """

    name: str
    scope: str
    read: float
    written: float
    loops: tuple[int, ...] = ()
    counted_once: bool = False

    @property
    def total(self) -> float:
        """Bytes in one run of the program."""
        times = 1
        for trips in self.loops:
            times *= trips
        return times * (self.read + self.written)


def moves(text: str) -> list[Move]:
    """The traffic of every instruction of a program that moves something."""
    reader = _Reader(parse(text))
    return list(reader.moves_in(reader.program.entry, (), OTHER))


def by_scope(found: Iterable[Move]) -> dict[str, float]:
    """GB by scope."""
    total = dict.fromkeys(ALL_SCOPES, 0.0)
    for move in found:
        total[move.scope] += move.total / 1e9
    return total


class _Computation:
    """Instructions of a computation by name, and who uses their results."""

    def __init__(self, instructions: list[Instruction]):
        self.by_name = {i.name: i for i in instructions}
        self.users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for i in instructions:
            for name in dict.fromkeys(i.operands):
                self.users[name].append(i)
        self.parameters = {int(i.arguments): i for i in instructions if i.opcode == "parameter"}
        self.root = next((i for i in instructions if i.is_root), None)

    def one(self, name: str) -> Array:
        """The only array of an instruction's type; for a tuple, the sum of its arrays in HBM."""
        found = arrays(self.by_name[name].type)
        if len(found) == 1:
            return found[0]
        hbm = [a for a in found if a.in_hbm]
        return Array(
            sum(a.elements for a in hbm), sum(a.bytes for a in hbm), sum(a.padded for a in hbm),
            in_hbm=True,
        )  # fmt: skip


class _Reader:
    """Walks through a program."""

    def __init__(self, program: Program):
        self.program = program
        self._computations: dict[str, _Computation] = {}
        self._taken: dict[tuple[str, str], float] = {}

    def computation(self, name: str) -> _Computation:
        if name not in self._computations:
            self._computations[name] = _Computation(self.program.computations.get(name, []))
        return self._computations[name]

    def moves_in(self, name: str, loops: tuple[int, ...], scope: str) -> Iterator[Move]:
        """The traffic of a computation.

        Args:
          name: of the computation.
          loops: trips of the loops around it.
          scope: of instructions that nothing else tells the scope of.
        """
        here = self.computation(name)
        for i in here.by_name.values():
            inside = scope_of(i.words) or scope
            if i.opcode == "while":
                trips = self.program.trips(i)
                for m in self.moves_in(i.body, (*loops, trips or 1), inside):
                    yield m._replace(counted_once=m.counted_once or trips is None)
            elif i.opcode == "conditional":
                names = self.program.branches(i)
                branches = [list(self.moves_in(b, loops, inside)) for b in names]
                yield from max(branches, key=lambda b: sum(m.total for m in b))
            elif i.opcode in ("call", "call-start"):
                yield from self.moves_in(i.called, loops, inside)
            else:
                read, written = self._moved(i, here)
                if read or written:
                    yield Move(i.name, self._scope(i, here) or scope, read, written, loops)

    def _moved(self, i: Instruction, here: _Computation) -> tuple[float, float]:
        """Bytes that an instruction reads and writes."""
        if i.opcode in _FREE or any(f'"{call}"' in i.attributes for call in _FREE_CALLS):
            return 0.0, 0.0
        operands = [n for n in dict.fromkeys(i.operands) if n in here.by_name]
        if i.opcode.removesuffix("-start") == "ragged-all-to-all":
            return _exchanged(here, operands)
        if i.opcode in ("fusion", "async-start") and i.called:
            return self._moved_by_fusion(i, here)
        if i.opcode.endswith("-done"):
            pair = here.by_name[operands[0]] if operands else i
            counted = pair.opcode in _COUNTED_AT_START
            return 0.0, 0.0 if counted else _hbm(i.type)
        if i.opcode.endswith("-update"):
            return 0.0, 0.0
        if i.opcode in (*_SLICES, *_UPDATES):
            return _moved_by_slice(i, here)
        read = sum(_hbm(here.by_name[name].type) for name in operands)
        if i.opcode.removesuffix("-start") in _SLICES:
            taken = sum(here.one(u.name).elements for u in here.users[i.name])  # its end
            read *= taken / max(here.one(operands[0]).elements, 1)
        return read, 0.0 if i.opcode.endswith("-start") else _hbm(i.type)

    def _moved_by_fusion(self, i: Instruction, here: _Computation) -> tuple[float, float]:
        inside = self.computation(i.called)
        if any('"AsyncCollectiveDone"' in j.attributes for j in inside.by_name.values()):
            return 0.0, 0.0
        read = 0.0
        for name, place in _places(i, here):
            if place in inside.parameters:
                share = self._share_taken(i.called, inside.parameters[place].name)
                read += share * _hbm(here.by_name[name].type)
        started = [j for j in inside.by_name.values() if '"AsyncCollectiveStart"' in j.attributes]
        if started:
            collectives = [j for j in inside.by_name.values() if j.opcode in COLLECTIVES]
            return read, sum(_hbm(j.type) for j in collectives)
        root = inside.root
        if root is None:
            return read, _hbm(i.type)
        return read, self._written(i.called, root.name)

    def _share_taken(self, computation: str, name: str) -> float:
        """The share of an instruction's elements that a computation reads; a gather may repeat."""
        key = (computation, name)
        if key not in self._taken:
            here = self.computation(computation)
            i = here.by_name[name]
            shares = [float(i.is_root)]
            for user in here.users[name]:
                passed_on = i.opcode == "parameter" and user.opcode in ("tuple", *COLLECTIVES)
                if not (_is_continuation(computation) and passed_on):
                    shares.append(self._share_by(user, i, computation))
            self._taken[key] = min(sum(shares), max(1.0, *shares))
        return self._taken[key]

    def _share_by(self, user: Instruction, i: Instruction, computation: str) -> float:
        """The share of an instruction's elements that one of its users reads."""
        here = self.computation(computation)
        elements = here.one(i.name).elements
        is_first = user.operands[0] == i.name and user.operands.count(i.name) == 1
        if user.opcode in _SLICES and is_first:
            return here.one(user.name).elements / max(elements, 1)
        if user.opcode in _UPDATES and is_first and _is_result(here, user):
            # A scatter adds to what is there; a slice replaces it.
            updated = here.one(_update(user)).elements if user.opcode == "scatter" else 0
            return updated / max(elements, 1)
        if user.opcode == "fusion":
            inside = self.computation(user.called)
            places = [n for n, operand in enumerate(user.operands) if operand == i.name]
            return sum(self._share_taken(user.called, inside.parameters[n].name) for n in places)
        if user.opcode in _BY_ELEMENT and here.one(user.name).elements == elements:
            return self._share_taken(computation, user.name)
        return 1.0

    def _written(self, computation: str, name: str) -> float:
        """Bytes that a fusion writes for a result of it."""
        here = self.computation(computation)
        i = here.by_name[name]
        if i.opcode == "tuple":
            names = dict.fromkeys(i.operands)
            return sum(self._written(computation, n) for n in names)
        if _is_continuation(computation) and i.opcode in ("parameter", *COLLECTIVES):
            return 0.0
        place = _hbm(i.type)
        if i.opcode == "bitcast":
            source = here.one(i.operands[0])
            inner = self._written(computation, i.operands[0])
            return inner if source.in_hbm and place else place
        if i.opcode == "fusion" and place:
            root = self.computation(i.called).root
            return place if root is None else self._written(i.called, root.name)
        if i.opcode in _UPDATES and _is_in_place(here, i):
            return place * self._updated(here, i) / max(here.one(name).elements, 1)
        return place

    def _updated(self, here: _Computation, i: Instruction) -> float:
        """Elements that an update, and those that it continues, replace."""
        elements = here.one(_update(i)).elements
        target = _through_bitcasts(here, i.operands[0])
        if target.opcode in _UPDATES:
            elements += self._updated(here, target)
        return elements

    def _scope(self, i: Instruction, here: _Computation) -> str:
        """The scope of an instruction.

        That of its own `op_name`, which for a fusion is its root's; else the one with most bytes
        inside of the fusion; else that of the neighbour with which it shares the largest array:
        one that uses its result, or made an operand.  "" if none of them has one.
        """
        if named := self._own_scope(i):
            return named
        shared: dict[str, float] = {}
        neighbours = [*_users(here, i, i.type), *_makers(here, i)]
        for kind, neighbour in neighbours:
            if named := self._own_scope(neighbour):
                largest = max((a.bytes for a in arrays(kind)), default=0.0)
                shared[named] = max(shared.get(named, 0.0), largest)
        return max(shared, key=lambda s: shared[s], default="")

    def _own_scope(self, i: Instruction) -> str:
        if named := scope_of(i.words):
            return named
        inside: dict[str, float] = collections.defaultdict(float)
        for j in self.program.computations.get(i.called, []) if i.opcode == "fusion" else []:
            if j.opcode != "parameter" and (named := scope_of(j.words)):
                inside[named] += sum(a.bytes for a in arrays(j.type))
        return max(inside, key=lambda s: inside[s], default="")


def scope_of(words: list[str]) -> str:
    """The innermost scope of an `op_name`; "" without one."""
    return next((SCOPES[word] for word in reversed(words) if word in SCOPES), "")


def _hbm(kind: str) -> float:
    """Bytes of a type's arrays that are in HBM, whole tiles."""
    return sum(a.padded for a in arrays(kind) if a.in_hbm)


def _places(i: Instruction, here: _Computation) -> Iterator[tuple[str, int]]:
    """The operands of a fusion with their numbers."""
    for n, name in enumerate(i.operands):
        if name in here.by_name:
            yield name, n


def _exchanged(here: _Computation, operands: list[str]) -> tuple[float, float]:
    """A ragged exchange: it writes into its second operand, in place."""
    rows, room = (here.by_name[name].type for name in operands[:2])
    most = min(sum(a.padded for a in arrays(kind)) for kind in (rows, room))
    return most * bool(_hbm(rows)), most * bool(_hbm(room))


def _moved_by_slice(i: Instruction, here: _Computation) -> tuple[float, float]:
    """A slice or an update that is not in a fusion."""
    operands = [here.by_name[name].type for name in i.operands if name in here.by_name]
    rest = sum(_hbm(kind) for kind in operands[1:])
    whole = here.one(i.operands[0])
    if i.opcode in _SLICES:
        share = here.one(i.name).elements / max(whole.elements, 1)
        return rest + share * _hbm(operands[0]), _hbm(i.type)
    share = here.one(_update(i)).elements / max(whole.elements, 1)
    before = share * _hbm(operands[0]) if i.opcode == "scatter" else 0.0
    return rest + before, share * _hbm(i.type)


def _update(i: Instruction) -> str:
    """The name of the operand that holds the new values."""
    return i.operands[-1] if i.opcode == "scatter" else i.operands[1]


def _through_bitcasts(here: _Computation, name: str) -> Instruction:
    i = here.by_name[name]
    while i.opcode == "bitcast":
        i = here.by_name[i.operands[0]]
    return i


def _is_in_place(here: _Computation, i: Instruction) -> bool:
    """Whether an update changes an operand of its fusion, and nothing computed in it."""
    target = _through_bitcasts(here, i.operands[0])
    if target.opcode in _UPDATES:
        return _is_in_place(here, target)
    return target.opcode == "parameter"


def _is_result(here: _Computation, i: Instruction) -> bool:
    """Whether a fusion does nothing with an instruction but return it or update it further."""
    users = here.users[i.name]
    passes = ("tuple", "bitcast", *_UPDATES)
    return all(u.opcode in passes and (u.is_root or _is_result(here, u)) for u in users)


def _is_continuation(computation: str) -> bool:
    """Whether a fused computation continues a collective beside its own work."""
    return computation.startswith("async_collective_fusion")


def _users(here: _Computation, i: Instruction, kind: str) -> Iterator[tuple[str, Instruction]]:
    """The instructions that use a result, with its type, through those that move nothing."""
    for user in here.users[i.name]:
        if user.opcode in ("bitcast", "get-tuple-element") or user.opcode.endswith("-done"):
            yield from _users(here, user, user.type)
        elif user.opcode not in ("tuple", "while", "conditional"):
            yield kind, user


def _makers(here: _Computation, i: Instruction) -> Iterator[tuple[str, Instruction]]:
    """The instructions that made the operands, with their types; see `_users`."""
    for name in i.operands:
        if (made := here.by_name.get(name)) is None:
            continue
        yield made.type, made
        if made.opcode in ("bitcast", "get-tuple-element") or made.opcode.endswith("-start"):
            yield from _makers(here, made)
