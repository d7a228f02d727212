"""The differences of two results of the self-check, by leg and device, in all processes.

Shapes: B sequences, S positions, K activated per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dsmoe_jax.parallel import hosts


class Failure(NamedTuple):
    """A leg that is wrong on some devices.

    Attributes:
      leg: forward, d-inputs, d-weights of a matrix, or router.
      devices: their ids.
      error: of the worst row, relative to a typical row; NaN if a number is none.
    """

    leg: str
    devices: list[int]
    error: float


def differences(
    found: dict[str, Any], wanted: dict[str, Any], same_BS: np.ndarray, tolerance: float
) -> Iterator[Failure]:
    """Every leg in which some device of this process is off by more than rounding."""
    for (path, want), got in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        by_token = want.shape[:2] == same_BS.shape
        typical = math.sqrt(np.square(want).mean()) or 1.0
        errors = {}
        for shard in got.addressable_shards:
            off = np.asarray(shard.data, np.float32) - want[shard.index]
            if by_token:
                off = np.where(same_BS[shard.index[:2]][..., None], off, 0)
            squares = np.square(off)
            rows = squares.mean(axis=-1) if off.ndim > 1 else squares
            errors[shard.device.id] = math.sqrt(rows.max()) / typical
        wrong = sorted(device for device, error in errors.items() if not error <= tolerance)
        if wrong:
            yield Failure(path[0].key, wrong, max((errors[d] for d in wrong), key=_size))


def _size(error: float) -> float:
    """An error to compare: NaN is the worst."""
    return math.inf if math.isnan(error) else error


def devices_of(ids_BSK: jax.Array, same_BS: np.ndarray) -> list[int]:
    """The devices of this process whose tokens went to other experts."""
    return sorted(
        shard.device.id
        for shard in ids_BSK.addressable_shards
        if not same_BS[shard.index[:2]].all()
    )


def refuse(failures: list[Failure], missing: str | None, described: str, tolerance: float) -> None:
    """Ends all processes with what any of them has found."""
    by_leg: dict[str, Failure] = {}
    for one in hosts.gather(failures):
        for leg, devices, error in one:
            before = by_leg.get(leg, Failure(leg, [], 0.0))
            worst = max(before.error, error, key=_size)
            by_leg[leg] = Failure(leg, sorted({*before.devices, *devices}), worst)
    said = [_say(failure) for failure in by_leg.values()]
    said += [missing] if missing else []
    if said:
        raise ValueError(
            f"--self_check: {described}: {'; '.join(said)} (error of the worst row relative to a"
            f" typical one; rounding stays below {tolerance:g}).  Nothing was written; take another"
            " model.moe.dispatch.name or model.moe.expert_backend, or --noself_check to train all"
            " the same"
        )


def _say(failure: Failure) -> str:
    devices = f"device{'s' * (len(failure.devices) > 1)} {', '.join(map(str, failure.devices))}"
    if math.isnan(failure.error):
        return f"{failure.leg} is not a number on {devices}: rows are read that nobody has written"
    return f"{failure.leg} is off by {failure.error:.2g} on {devices}"
