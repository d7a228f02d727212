"""What one chip has: the table behind every plan and roofline."""

from __future__ import annotations

import dataclasses

from dsmoe_jax.hardware.peak import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its vendor's data sheet; one device of a mesh.

    Attributes:
      kind: JAX's name of it.
      hbm_gb: memory, 10^9 bytes.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s that it can receive, all links together: a TPU's interconnect, a
        GPU's NVLink within one server.
    """

    kind: str
    hbm_gb: float
    hbm_bandwidth: float
    link_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]


CHIPS = {
    "v4": Chip("TPU v4", 32, 1.23e12, 300e9),
    "v5e": Chip("TPU v5 lite", 16, 0.82e12, 200e9),
    "v5p": Chip("TPU v5p", 95, 2.77e12, 600e9),
    "v6e": Chip("TPU v6 lite", 32, 1.64e12, 400e9),
    "h100": Chip("NVIDIA H100", 80, 3.35e12, 450e9),
}
TPUS = tuple(name for name in CHIPS if name.startswith("v"))
