"""The device mesh: how the devices of a run are laid out.

data     replicas: every device has the parameters, and its part of the batch
fsdp     like data, but parameters and moments are split too, and gathered layer by layer
expert   the routed experts are split; outside MoE layers these devices act like `fsdp`
tensor   heads, widths and the vocabulary are split: neighbours work on the same tokens

The mesh is ambient: training, evaluation and generation run under `jax.set_mesh(mesh)`, and what
needs it (sharding.py, the dispatchers) asks JAX.  No module is handed one; without one everything
runs on one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsmoe_jax.checks import require

AXES = ("data", "fsdp", "expert", "tensor")  # neighbours in `tensor` are the closest devices
BATCH_AXES = ("data", "fsdp", "expert")  # what the sequences of a batch are split over


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices."""

    data: int = -1  # -1: what the other axes leave
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        free = [axis for axis in AXES if getattr(self, axis) == -1]
        for axis in AXES:
            size = getattr(self, axis)
            require(size > 0 or size == -1, f"mesh.{axis}", size, "must be > 0, or -1 for the rest")
            require(
                size != -1 or len(free) == 1,
                f"mesh.{axis}",
                size,
                f"only one axis can be what is left, here {' and '.join(free)} are",
            )

    def sizes(self, n_devices: int) -> dict[str, int]:
        """The size of each axis on that many devices.

        Raises:
          ValueError: if they cannot be arranged so.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        product = math.prod(size for size in sizes.values() if size != -1)
        for axis, size in sizes.items():
            if size == -1:
                sizes[axis] = n_devices // product
        if math.prod(sizes.values()) != n_devices:
            shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
            fixed = max((axis for axis in AXES if getattr(self, axis) != -1), key=sizes.__getitem__)
            free = [axis for axis in AXES if getattr(self, axis) == -1]
            want = f"{product} must divide" if free else f"{product} must be"
            raise ValueError(
                f"mesh.{fixed}={getattr(self, fixed)}: {shape or 'one device'}:"
                f" {want} the {n_devices} devices there are"
            )
        return sizes


def platform() -> str:
    """What the code at hand will run on ("cpu", "gpu", "tpu"): the one place that knows.

    That of the ambient mesh, whose devices may be of another machine (`dsmoe_jax.aot`); without a
    mesh JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, with the axes `AXES`, all of `AxisType.Auto`.

    Auto, because the model is written for one device and XLA splits it by the constraints of
    sharding.py; only the dispatchers, which must know their shard, use `jax.shard_map`.

    Args:
      config: the section `mesh`.
      devices: None is all devices of all processes.

    Raises:
      ValueError: if the devices cannot be arranged so.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    # Not `jax.make_mesh`: on 4 x 4 x 4 chips it has no axis of 2 or 8.
    arranged = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
