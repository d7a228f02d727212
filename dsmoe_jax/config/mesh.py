"""The section `mesh` of a config: how the devices of a run are laid out (parallel/mesh.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping

from dsmoe_jax.config.checks import require

# Neighbours in `tensor` are the closest devices, those in `stage` the farthest.
AXES = ("stage", "data", "fsdp", "expert", "tensor")
# Axes that may cross the network between slices, those that send the least first: a pipeline hands
# on activations, replicas sum their gradients once a step.  The other axes stay within a slice.
ACROSS_SLICES = tuple(axis for axis in ("stage", "data") if axis in AXES)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices."""

    stage: int = 1
    data: int = -1  # -1: the devices that the other axes leave
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    # Groups of devices with a fast network inside, and the data-centre network between them: slices
    # of TPUs, servers of GPUs.  -1: of TPUs as many as they say themselves, of others one.
    slices: int = -1
    # Meshes for other numbers of devices, the first that fits is taken: ("data=1,fsdp=4",
    # "data=1,fsdp=2,accumulation_steps=2").  Fewer devices may need more micro-batches.
    fallbacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        want = "must be > 0, or -1 for what the devices say"
        require(self.slices > 0 or self.slices == -1, "mesh.slices", self.slices, want)
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
        for text in self.fallbacks:
            parse(text, f"mesh.fallbacks: {text!r}", accumulation=True)

    @property
    def is_chosen(self) -> bool:
        """Whether any axis is given; else the planner may choose them."""
        return any(getattr(self, field.name) != field.default for field in _axes())

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

    def fitting(self, n_devices: int) -> tuple[MeshConfig, int | None]:
        """The mesh for that many devices: this one or else a fallback.

        Returns:
          The mesh, with the same fallbacks, and the `accumulation_steps` that it asks for, if any.

        Raises:
          ValueError: if none of them fits.
        """
        try:
            self.sizes(n_devices)
        except ValueError as error:
            for text in self.fallbacks:
                mesh, steps = parse(text, "mesh.fallbacks", accumulation=True)
                with contextlib.suppress(ValueError):
                    mesh.sizes(n_devices)
                    return dataclasses.replace(mesh, fallbacks=self.fallbacks), steps
            if not self.fallbacks:
                raise
            none = f"nor does one of mesh.fallbacks: {'; '.join(self.fallbacks)}"
            raise ValueError(f"{error}, {none}") from error
        return self, None


def parse(text: str, name: str, accumulation: bool = False) -> tuple[MeshConfig, int | None]:
    """Reads `fsdp=2,expert=4`.

    Args:
      text: sizes by axis.
      name: what the user calls it, for errors.
      accumulation: whether `accumulation_steps=N` may stand among them.

    Returns:
      The mesh, and the `accumulation_steps`, if any.

    Raises:
      ValueError: if it is something else.
    """
    sizes = {}
    others = ["accumulation_steps"] if accumulation else []
    for item in text.split(","):
        key, _, size = item.partition("=")
        if key not in (*AXES, *others) or not re.fullmatch(r"-1|\d+", size):
            raise ValueError(
                f"{name}: {item!r} must be AXIS=NUMBER, the axis one of"
                f" {', '.join((*AXES, *others))}"
            )
        sizes[key] = int(size)
    steps = sizes.pop("accumulation_steps", None)
    if steps is not None and steps < 1:
        raise ValueError(f"{name}: accumulation_steps={steps}: must be > 0")
    try:
        return dataclasses.replace(MeshConfig(), **sizes), steps
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _axes() -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(MeshConfig) if field.name in AXES]


def across_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """The part of each axis that lies across slices; their product is the number of slices.

    Raises:
      ValueError: if the axes that may cross cannot be cut so.
    """
    parts = dict.fromkeys(sizes, 1)
    left = slices
    for axis in ACROSS_SLICES:
        parts[axis] = math.gcd(sizes[axis], left)
        left //= parts[axis]
    cross = " x ".join(
        f"mesh.{axis}={sizes[axis]}" for axis in ACROSS_SLICES if axis == "data" or sizes[axis] > 1
    )
    stay = ", ".join(axis for axis in sizes if axis not in ACROSS_SLICES)
    want = f"must divide {cross}, which alone goes from slice to slice; {stay} stay inside of one"
    require(left == 1, "mesh.slices", slices, want)
    return parts
