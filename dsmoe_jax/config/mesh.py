"""The section `mesh` of a config: how the devices of a run are laid out (parallel/mesh.py)."""

from __future__ import annotations

import dataclasses
import math

from dsmoe_jax.config.checks import require

# Neighbours in `tensor` are the closest devices, those in `stage` the farthest.
AXES = ("stage", "data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices."""

    stage: int = 1
    data: int = -1  # -1: the devices that the other axes leave
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
          ValueError: if they do not make up that number.
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
