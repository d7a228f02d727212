"""Rows that the dispatch of one MoE layer moves and buffers: arithmetic, no devices.

Shapes: t tokens of one chip, E routed experts, K activated per token, P chips of the axis `expert`,
e = E/P experts of each.
"""

from __future__ import annotations

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
    """Distinct chips that hold experts of one token, expected if all choices are equally likely.

    With a device limit (`topk_group` of `n_group` groups, V2 section 2.1.2) they are at most the
    chips of those groups.  Chips and groups nest: one of the two numbers divides the other.
    """
    e = moe.n_routed_experts
    k = moe.num_experts_per_tok
    groups = moe.router.n_group
    m = moe.router.topk_group
    of_chip = e // p
    of_group = e // groups
    open_ = m * of_group + moe.n_identity_experts  # what a token may choose

    def miss(n: int) -> float:
        """Probability that none of n of the open experts is chosen."""
        return math.comb(open_ - n, k) / math.comb(open_, k)

    if of_chip <= of_group:
        return p * m / groups * (1 - miss(of_chip))
    held = of_chip // of_group  # groups of one chip, j of which are among the m
    hits = (
        math.comb(held, j) * math.comb(groups - held, m - j) * (1 - miss(j * of_group))
        for j in range(1, min(held, m) + 1)
    )
    return p * sum(hits) / math.comb(groups, m)
