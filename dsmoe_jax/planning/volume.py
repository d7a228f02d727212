"""How many rows the dispatch of one MoE layer moves and makes room for: arithmetic, no devices.

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
      received: that come from other chips, on the way out and again on the way back; expected if
        all choices are equally likely.
      label_bytes: what travels beside each of them on the way out: gates and choices.
      room: in the buffer of what is received.
      computed: in the arrays that the experts compute, padding included.
    """

    received: float
    label_bytes: int
    room: float
    computed: float


def volume(moe: MoEConfig, t: int, p: int) -> Volume:
    """What the config's dispatcher does with t tokens a chip on p chips."""
    e, k = moe.n_routed_experts, moe.num_experts_per_tok
    if p == 1 or not e:
        return Volume(0.0, 0, 0.0, float(t * k))
    choices = min(k, e // p)  # that a token can have on one chip
    chunk = t / moe.dispatch.chunks
    worst = p * chunk * choices
    load = (
        min(worst, math.ceil(moe.dispatch.buffer_factor * chunk * k))
        if moe.dispatch.buffer_factor
        else worst
    )
    label_bytes = 4 * _LANES * math.ceil(2 * choices / _LANES)
    if moe.dispatch.name == "all_gather":
        return Volume(float((p - 1) * t), 8 * k, p * chunk, load)
    if moe.dispatch.name == "fixed_slots":
        factor = moe.drop.capacity_factor if moe.drop else None
        slots = min(t, math.ceil(factor * t * k / p)) if factor else t
        return Volume(float((p - 1) * slots), label_bytes, p * slots, float(p * slots))
    others = chips_of_a_token(moe, p) * (p - 1) / p
    return Volume(others * t, label_bytes, min(p * chunk, load), load)


def chips_of_a_token(moe: MoEConfig, p: int) -> float:
    """Distinct chips that hold experts of one token, expected if all choices are equally likely.

    With a device limit (`topk_group` of `n_group` groups, V2 section 2.1.2) as many as there are
    in those groups at most.  Chips and groups nest: one's number divides the other's.
    """
    e, k, groups, m = (
        moe.n_routed_experts,
        moe.num_experts_per_tok,
        moe.router.n_group,
        moe.router.topk_group,
    )
    of_chip, of_group = e // p, e // groups
    open_ = m * of_group  # experts in the groups that a token may use
    miss = lambda n: math.comb(open_ - n, k) / math.comb(open_, k)  # noqa: E731
    if of_chip <= of_group:
        return p * m / groups * (1 - miss(of_chip))
    held = of_chip // of_group  # groups of one chip, j of which are among the m
    hits = (
        math.comb(held, j) * math.comb(groups - held, m - j) * (1 - miss(j * of_group))
        for j in range(1, min(held, m) + 1)
    )
    return p * sum(hits) / math.comb(groups, m)
