"""One chip's arithmetic, memory and links: the table behind every plan, roofline and MFU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dsmoe_jax.config.frozen import FrozenDict


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its vendor's data sheet; one device of a mesh.

    Attributes:
      kinds: beginnings of the names that JAX gives it ("NVIDIA H100 80GB HBM3").
      peak_flops: FLOP/s of bfloat16 matrix products, without sparsity.
      hbm_gb: memory, 10^9 bytes.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s that it can receive, all links together: a TPU's interconnect, a
        GPU's NVLink within one server.
      between_slices: bytes/s that it can receive over the data-centre network, its part of its
        host's; None: not known.
      torus_dimensions: of a TPU's interconnect; None for GPUs, which have a switch.
      description: what JAX needs to describe a slice of it, beside the name.
    """

    kinds: tuple[str, ...]
    peak_flops: float
    hbm_gb: float
    hbm_bandwidth: float
    link_bandwidth: float
    between_slices: float | None = None
    torus_dimensions: int | None = None
    description: Mapping[str, str] = FrozenDict()


# Between slices: v5e 6.4 and v6e 25.6 Tbit/s a pod of 256 (cloud.google.com/tpu/docs/v5e, v6e); v4
# and v5p 25 GB/s a host of four (jax-ml.github.io/scaling-book/tpus).  Between DGX servers one
# adapter a GPU: 200 Gbit/s of A100, 400 Gbit/s of the others.
CHIPS = {
    "v4": Chip(
        ("TPU v4",), 275e12, 32, 1.23e12, 300e9, 6.25e9, torus_dimensions=3,
        # Its two cores work as one device; without this the description has both.
        description=FrozenDict(chip_config_name="megacore"),
    ),
    "v5e": Chip(("TPU v5 lite",), 197e12, 16, 0.82e12, 200e9, 3.125e9, torus_dimensions=2),
    # Some runtimes call it v5.
    "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95, 2.77e12, 600e9, 6.25e9, torus_dimensions=3),
    "v6e": Chip(("TPU v6 lite",), 918e12, 32, 1.64e12, 400e9, 12.5e9, torus_dimensions=2),
    "a100": Chip(("NVIDIA A100",), 312e12, 80, 2.04e12, 300e9, 25e9),
    "h100": Chip(("NVIDIA H100",), 989e12, 80, 3.35e12, 450e9, 50e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141, 4.8e12, 450e9, 50e9),
    "b200": Chip(("NVIDIA B200",), 2250e12, 180, 8.0e12, 900e9, 50e9),
}  # fmt: skip
TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus_dimensions is not None)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, by the longest beginning; None if it is not listed."""
    kinds = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    fitting = [kind for kind in kinds if device_kind.startswith(kind)]
    return kinds[max(fitting, key=len)] if fitting else None
