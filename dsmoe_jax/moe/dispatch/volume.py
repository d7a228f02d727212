"""Rows that the dispatch of one MoE layer moves and buffers: arithmetic, no devices.

Shapes: t tokens of one chip, E routed experts, K activated per token, P chips of the axis `expert`,
e = E/P experts of each.
"""

from __future__ import annotations

import collections
import functools
import math
from typing import NamedTuple

from dsmoe_jax.config import MoEConfig

_LANES = 128  # a TPU pads the numbers of a row to a multiple of this


class Volume(NamedTuple):
    """Rows of one chip, layer and micro-batch.

    Attributes:
      visits: from all chips, its own included.
      received: from other chips, on the way out and again on the way back; the expectation if all
        choices are equally likely.
      label_bytes: of the gates and choices that travel with each of them on the way out.
      buffered: in the buffer of received rows.
      room: assignments for whose results there is room.
      computed: assignments that experts compute, if all choices are equally likely.
    """

    visits: float
    received: float
    label_bytes: int
    buffered: float
    room: float
    computed: float


def on_one_chip(moe: MoEConfig, t: int, p: int) -> Volume:
    """One chip holds all experts: nothing travels."""
    del p
    assignments = t * moe.computed_per_token
    return Volume(float(t), 0.0, 0, 0.0, assignments, assignments)


def of_all_to_all(moe: MoEConfig, t: int, p: int) -> Volume:
    """A row travels once to each chip that holds some of its token's experts."""
    visits = chips_of_a_token(moe, p) * t
    computed = t * moe.computed_per_token
    buffered = p * t / moe.dispatch.chunks
    room = _max_rows(moe, t, p)
    return Volume(visits, visits * (p - 1) / p, _label_bytes(moe, p), buffered, room, computed)


def of_all_gather(moe: MoEConfig, t: int, p: int) -> Volume:
    """Every row travels to every chip, with all its K choices and gates."""
    chunk = t / moe.dispatch.chunks
    label_bytes = 8 * moe.num_experts_per_tok
    visits = float(p * t)
    room = _max_rows(moe, t, p)
    computed = t * moe.computed_per_token
    return Volume(visits, visits - t, label_bytes, p * chunk, room, computed)


def of_fixed_slots(moe: MoEConfig, t: int, p: int) -> Volume:
    """Each chip has the same number of slots for each other chip, filled or not."""
    slots = t
    if moe.drop is not None:
        slots = min(t, math.ceil(moe.drop.capacity_factor * t * moe.computed_per_token / p))
    room = float(p * slots)
    received = room - slots
    computed = min(room, t * moe.computed_per_token)
    return Volume(room, received, _label_bytes(moe, p), room, room, computed)


def _max_rows(moe: MoEConfig, t: int, p: int) -> float:
    """Assignments that the buffers of a chip hold, in one chunk."""
    return p * t / moe.dispatch.chunks * _choices(moe, p)


def _choices(moe: MoEConfig, p: int) -> int:
    """The most experts that a token can have on one chip."""
    return min(moe.num_experts_per_tok, moe.n_routed_experts // p)


def _label_bytes(moe: MoEConfig, p: int) -> int:
    """Choices on a chip and their gates, padded as a TPU does."""
    return 4 * _LANES * math.ceil(2 * _choices(moe, p) / _LANES)


def chips_of_a_token(moe: MoEConfig, p: int) -> float:
    """Distinct chips that hold experts of one token, expected if all rankings are equally likely.

    With a device limit (`topk_group` of `n_group` groups, V2 section 2.1.2) a token may use the M
    groups with the best experts.  Exact where a group's best expert decides; where its two best do
    (V3), a little too many.  Chips and groups nest: one of the two numbers divides the other.
    """
    router = moe.router
    e, z = moe.n_routed_experts, moe.n_identity_experts
    return _expected_chips(e, z, moe.num_experts_per_tok, router.n_group, router.topk_group, p)


class _Seen(NamedTuple):
    """Counts of what a token's choices so far are on; identity experts are on no chip."""

    groups: int = 0
    chips: int = 0
    identity: int = 0

    def plus(self, groups: int = 0, chips: int = 0, identity: int = 0) -> _Seen:
        """With so many more."""
        return _Seen(self.groups + groups, self.chips + chips, self.identity + identity)


@functools.cache
def _expected_chips(e: int, z: int, k: int, n_groups: int, m: int, p: int) -> float:
    """Goes down the ranking of the experts, choice by choice.

    The groups with the best experts are those that come first.  So the next choice is any expert
    that is left: of all groups, or of the M that came when there are so many.
    """
    chances = {_Seen(): 1.0}
    for choices in range(k):
        after: dict[_Seen, float] = collections.defaultdict(float)
        for seen, chance in chances.items():
            ways = _next_choice(seen, choices, e, z, e // n_groups, e // p, seen.groups < m)
            for new, experts in ways.items():
                after[new] += chance * experts / sum(ways.values())
        chances = after
    return sum(chance * seen.chips for seen, chance in chances.items())


def _next_choice(
    seen: _Seen, choices: int, e: int, z: int, of_group: int, of_chip: int, others: bool
) -> dict[_Seen, int]:
    """The experts that may be chosen next, by what is seen then; `others`: of new groups too."""
    in_groups = seen.groups * of_group
    on_chips = seen.chips * of_chip
    ways = {seen.plus(identity=1): z - seen.identity}
    ways[seen] = min(in_groups, on_chips) - (choices - seen.identity)
    if of_chip <= of_group:
        ways[seen.plus(chips=1)] = in_groups - on_chips
        ways[seen.plus(groups=1, chips=1)] = others * (e - in_groups)
    else:
        ways[seen.plus(groups=1)] = others * (on_chips - in_groups)
        ways[seen.plus(groups=1, chips=1)] = others * (e - on_chips)
    return {new: experts for new, experts in ways.items() if experts}
