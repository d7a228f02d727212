"""The mesh of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from dsmoe_jax.config import Config, stages_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.model import pipelined
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import BATCH_AXES, make_mesh
from dsmoe_jax.training.start import state_shapes


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
