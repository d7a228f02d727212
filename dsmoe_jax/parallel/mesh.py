"""The device mesh: how the devices of a run are laid out.

stage    the layers are split, and activations pass from neighbour to neighbour (pipeline.py);
         outside of the layers these devices act like `data`
data     replicas: every device has the parameters, and its part of the batch
fsdp     like data, but parameters and moments are split too, and gathered layer by layer
expert   the routed experts are split; outside MoE layers these devices act like `fsdp`
tensor   heads, widths and the vocabulary are split: neighbours work on the same tokens

Of several slices, with the data-centre network between them, `stage` and `data` go from slice to
slice and the other axes stay inside of one.  Sent there are the activations between two stages, and
once a step the sums of gradients.

The mesh is ambient: training, evaluation and generation run under `jax.set_mesh(mesh)`, and
sharding.py and the dispatchers ask JAX for it.  No module takes one as an argument; without one
everything runs on one device.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsmoe_jax.config.checks import require
from dsmoe_jax.config.mesh import AXES, MeshConfig, across_slices

# The sequences of a batch are split over these; inside of a stage over all but the first.
BATCH_AXES = ("stage", "data", "fsdp", "expert")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, with the axes `AXES`, all of `AxisType.Auto`.

    Args:
      config: the section `mesh`.
      devices: None takes all devices of all processes.

    Raises:
      ValueError: if the axes' sizes do not make up the number of devices, or the slices do not
        divide the axes that cross them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    slices = slices_of(devices, config.slices)
    outer = across_slices(sizes, len(slices))
    inner = {axis: sizes[axis] // outer[axis] for axis in AXES}
    arranged = _arranged(slices, tuple(inner.values()), tuple(outer.values()))
    # Auto, because the model is written for one device and XLA splits it by the constraints of
    # sharding.py; only the dispatchers, which must know their shard, use `jax.shard_map`.
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Sequence[Any], wanted: int = -1) -> list[list[Any]]:
    """The devices of each slice.

    TPUs know theirs.  Others are cut into `wanted` groups of whole processes; those of one process
    into equal groups, which stand for slices in tests.

    Args:
      devices: of the run.
      wanted: `mesh.slices`.

    Raises:
      ValueError: if there are other slices than wanted, or they would be unequal.
    """
    of_slice: dict[int, list[Any]] = collections.defaultdict(list)
    if devices[0].platform == "tpu":
        for device in devices:
            of_slice[getattr(device, "slice_index", 0)].append(device)  # none, if there is one
        want = f"the devices are in {len(of_slice)} slices; must be that, or -1"
        require(wanted in (-1, len(of_slice)), "mesh.slices", wanted, want)
        return [of_slice[i] for i in sorted(of_slice)]
    n = 1 if wanted == -1 else wanted
    processes = sorted({device.process_index for device in devices})
    parts, what = (processes, "processes") if len(processes) > 1 else (devices, "devices")
    require(len(parts) % n == 0, "mesh.slices", n, f"must divide the {len(parts)} {what} there are")
    if n == 1:
        return [list(devices)]
    by_process = sorted(devices, key=lambda device: (device.process_index, device.id))
    size = len(devices) // n
    return [by_process[first : first + size] for first in range(0, len(devices), size)]


def _arranged(
    slices: list[list[Any]], inner: tuple[int, ...], outer: tuple[int, ...]
) -> np.ndarray:
    """The devices as an array of the mesh's shape: of every axis the part across slices first."""
    # Not `jax.make_mesh`: on 4 x 4 x 4 chips it has no axis of 2 or 8.
    if slices[0][0].platform == "tpu" and len(slices) > 1:
        devices = [device for one in slices for device in one]
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    # `create_hybrid_device_mesh` asks the devices for their slice, and only TPUs have one.
    of_slices = np.stack([_inside_a_slice(one, inner) for one in slices])
    n = len(inner)
    pairs = [axis for i in range(n) for axis in (i, n + i)]
    joined = of_slices.reshape(*outer, *inner).transpose(pairs)
    return joined.reshape([a * b for a, b in zip(outer, inner, strict=True)])


def _inside_a_slice(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
