"""How much of the time the device had something to do."""

from __future__ import annotations

import queue
import threading
import time

import jax


class DeviceClock:
    """Sees each step handed to the device and each step finished, and adds up the gaps.

    A thread waits for every step's output, so that the moment a step ends is known although the
    host is busy with something else then.
    """

    def __init__(self) -> None:
        self._dispatched: queue.Queue[tuple[float, jax.Array] | None] = queue.Queue()
        self._idle = 0.0
        self._ready: float | None = None  # when the device finished what it was last given
        self._lap_started: float | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def dispatched(self, output: jax.Array) -> None:
        """A step was just handed to the device; `output` is one of its results."""
        now = time.perf_counter()
        if self._lap_started is None:
            self._lap_started = now
        self._dispatched.put((now, output))

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them the device was idle.

        Called when the last step but one at the latest is finished.
        """
        assert self._lap_started is not None, "no step was dispatched"
        now, idle = time.perf_counter(), self._idle
        seconds, self._lap_started, self._idle = now - self._lap_started, now, 0.0
        return seconds, idle

    def restart(self) -> None:
        """Leaves out what happened since the last lap, when the device did something else."""
        self._lap_started, self._ready, self._idle = None, None, 0.0

    def close(self) -> None:
        """Ends the thread."""
        self._dispatched.put(None)
        self._thread.join()

    def _watch(self) -> None:
        while (item := self._dispatched.get()) is not None:
            started, output = item
            if self._ready is not None:
                self._idle += max(0.0, started - self._ready)
            output.block_until_ready()
            self._ready = time.perf_counter()
