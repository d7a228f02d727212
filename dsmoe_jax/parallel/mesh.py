"""The device mesh: how the devices of a run are laid out.

stage    the layers are split, and activations pass from neighbour to neighbour (pipeline.py);
         outside of the layers these devices act like `data`
data     replicas: every device has the parameters, and its part of the batch
fsdp     like data, but parameters and moments are split too, and gathered layer by layer
expert   the routed experts are split; outside MoE layers these devices act like `fsdp`
tensor   heads, widths and the vocabulary are split: neighbours work on the same tokens

The mesh is ambient: training, evaluation and generation run under `jax.set_mesh(mesh)`, and
sharding.py and the dispatchers ask JAX for it.  No module takes one as an argument; without one
everything runs on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsmoe_jax.config.mesh import AXES, MeshConfig

# The sequences of a batch are split over these; inside of a stage over all but the first.
BATCH_AXES = ("stage", "data", "fsdp", "expert")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, with the axes `AXES`, all of `AxisType.Auto`.

    Args:
      config: the section `mesh`.
      devices: None takes all devices of all processes.

    Raises:
      ValueError: if the axes' sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    # Not `jax.make_mesh`: on 4 x 4 x 4 chips it has no axis of 2 or 8.
    arranged = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    # Auto, because the model is written for one device and XLA splits it by the constraints of
    # sharding.py; only the dispatchers, which must know their shard, use `jax.shard_map`.
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
