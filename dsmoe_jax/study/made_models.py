"""Models that surgery makes of finished runs, for the runs of an experiment that need them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.study.cells import Cell
from dsmoe_jax.study.experiment import Arm
from dsmoe_jax.surgery import OPERATIONS, complete
from dsmoe_jax.surgery.workdirs import operate
from dsmoe_jax.training.devices import open_mesh

MOMENTS = "none"  # a run that begins with a model has an optimizer of its own
_SEED = "seed"  # the option of all operations that draw something


def make(cell: Cell) -> None:
    """Makes what is missing; each workdir whole or not at all.

    Raises:
      ValueError: for a model that an operation does not fit, and `InUse` if another process is at
        this run.
      OSError: if the disk is full.
    """
    if all(place.exists() for key in cell.needs for place in cell.made(key)):
        return
    with workdirs.claim(cell.workdir, cell.launched), jax.set_mesh(open_mesh(cell.config)):
        for key in cell.needs:
            _make(cell, key)


def _make(cell: Cell, key: str) -> None:
    source = cell.needs[key].workdir
    for place, (name, options) in zip(cell.made(key), operations(cell, key), strict=True):
        if not place.exists():
            operate(name, str(source), str(place), options, moments=MOMENTS)
        source = place


def operations(cell: Cell, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Names of the operations on a run that a cell needs, and all of their options."""
    assert isinstance(cell.arm, Arm), "a probe needs no other run"
    return [
        (name, complete(name, {**_drawn(name, cell.seed), **options}))
        for name, options in cell.arm.from_runs[key].operations
    ]


def _drawn(operation: str, seed: int) -> Mapping[str, int]:
    """The seed of a run for an operation that draws something."""
    return {_SEED: seed} if _SEED in OPERATIONS[operation].options else {}
