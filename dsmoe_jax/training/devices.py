"""The mesh of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from dsmoe_jax.config import Config, differences, replace, stages_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.mesh import AXES
from dsmoe_jax.model import pipelined
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import BATCH_AXES, make_mesh
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.training.start import state_shapes


def on_devices(config: Config, n_devices: int) -> Config:
    """The config for the devices that there are: with one of `mesh.fallbacks`, if it needs one.

    A run goes on with fewer devices, or more, by the same command.

    Raises:
      ValueError: if no mesh fits, or what a fallback asks for would be another run.
    """
    mesh, steps = config.mesh.fitting(n_devices)
    changes: dict[str, Any] = {f"mesh.{axis}": getattr(mesh, axis) for axis in AXES}
    if steps is not None:
        key = "train.accumulation_steps"
        changes[key] = steps
        by_stage = config.train.stages is not None and key in config.train.stages
        require(
            workdirs.may_change(key, config) and not by_stage,
            "mesh.fallbacks",
            config.mesh.fallbacks,
            f"accumulation_steps={steps} would be another run: "
            + ("stages change it" if by_stage else "the tokens of a micro-batch compete"),
        )
    return replace(config, **changes)


def fallen_back(asked: Config, config: Config) -> str:
    """A sentence on the mesh that was taken in place of the one that was asked for."""
    changed = differences(asked, config)
    return "a mesh of mesh.fallbacks: " + ", ".join(
        f"{key}={now} (was {before})" for key, (before, now) in changed.items()
    )


def open_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, on all devices of all processes unless others are given.

    Raises:
      ValueError: naming the key, if it does not divide the devices, the batch or the model.
    """
    mesh = make_mesh(config.mesh, devices)
    for stage in stages_of(config):
        pipelined.check(stage.config, mesh.shape["stage"])
    sharding.check(state_shapes(config), mesh.shape)
    # Every stage has its own micro-batch.
    n_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis != "stage")
    for train in (stage.config.train for stage in stages_of(config)):
        micro_batch = train.global_batch_size // train.accumulation_steps
        require(
            micro_batch % n_shards == 0,
            "train.global_batch_size",
            train.global_batch_size,
            f"must be a multiple of {n_shards * train.accumulation_steps}: the mesh splits each of"
            f" train.accumulation_steps={train.accumulation_steps} micro-batches {n_shards} ways",
        )
    return mesh
