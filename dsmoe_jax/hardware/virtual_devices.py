"""Several virtual devices on one processor, on which a laptop tries a mesh."""

from __future__ import annotations

import os
import re

_FLAG = "--xla_force_host_platform_device_count"
# One device may be inside several independent collectives at once, in another order than the next
# device: a program has few of them that wait for nothing else.
_THREADS_PER_DEVICE = 16


def allow_waiting(devices: int | None = None) -> None:
    """Gives XLA:CPU threads for all collectives that wait; call it before the first computation.

    It has a thread for each device, and a collective holds its thread until all devices have come.
    Devices that start independent collectives in different orders wait for each other for ever; XLA
    ends the process after 40 s.  (Tried: a step on fsdp 2 x expert 2 x tensor 2, four processes
    on two cores: all four ended before the tenth step; with more threads none in 7,200 steps.)

    Args:
      devices: how many there will be; None: what XLA's flag in the environment says, or JAX's.
    """
    if devices is None:
        flags = os.environ.get("XLA_FLAGS", "")
        said = re.findall(rf"{_FLAG}=(\d+)", flags)
        devices = max(int(n) for n in ["1", *said, os.environ.get("JAX_NUM_CPU_DEVICES", "1")])
    if devices > 1:
        # XLA reads it, in place of the number of cores, when it makes its threads.
        os.environ.setdefault("NPROC", str(_THREADS_PER_DEVICE * devices))
