"""The time that each host takes for itself, side by side: which one is slower than the others.

In a step all devices wait for the slowest, so the step's time is the same everywhere and names
nobody.  What a host does alone does name it: fetching its rows of the batch, and writing, checking
and counting between the steps.  Waiting for the device is left out, and so are handing it a step,
which waits where the queue is full, and saving, where each host waits for the others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, WORK = "host_data_seconds", "host_work_seconds"  # keys of metrics.jsonl, a number a host
_KEYS = (DATA, WORK)


class HostTimes:
    """Adds up a host's own seconds, and gathers those of all hosts without waiting for any.

    Args:
      mesh: of the run, over whose devices the numbers travel between two steps.
    """

    def __init__(self, mesh: Mesh):
        self._seconds: dict[str, float] = dict.fromkeys(_KEYS, 0.0)
        self._steps = 0
        self._one_a_device = NamedSharding(mesh, P(mesh.axis_names))
        self._to_all = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
        processes = [device.process_index for device in mesh.devices.flat]
        self._first_device = [processes.index(i) for i in range(jax.process_count())]

    @contextlib.contextmanager
    def spent(self, key: str) -> Iterator[None]:
        """Counts the seconds inside as `DATA` or `WORK`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[key] += time.perf_counter() - began

    def step(self) -> None:
        """One more step was handed to the device."""
        self._steps += 1

    def gather(self) -> Any:
        """Begins to gather the seconds a step since the last call; to be fetched, then `row`.

        All processes must call it after the same step.
        """
        own = np.array([self._seconds[key] / max(self._steps, 1) for key in _KEYS], np.float32)
        self._seconds = dict.fromkeys(_KEYS, 0.0)
        self._steps = 0
        if jax.process_count() == 1:
            return own[None]
        shape = (self._one_a_device.num_devices, len(_KEYS))
        return self._to_all(
            jax.make_array_from_callback(shape, self._one_a_device, lambda _: own[None])
        )

    def row(self, gathered: np.ndarray) -> dict[str, list[float]]:
        """Keys of metrics.jsonl: seconds a step of each host, in the order of the processes."""
        by_host = gathered[self._first_device]
        return {key: by_host[:, i].tolist() for i, key in enumerate(_KEYS)}
