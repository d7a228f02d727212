"""The share of the time in which the device is idle."""

from __future__ import annotations

import contextlib
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
        self._outputs: queue.Queue[jax.Array | None] = queue.Queue()
        self._given = self._finished = 0  # steps
        self._last_finished = 0.0  # when
        self._lap_started: float | None = None
        self._idle = 0.0  # of this lap
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def dispatched(self, output: jax.Array) -> None:
        """A step was just handed to the device; `output` is one of its results."""
        now = time.perf_counter()
        if self._lap_started is None:
            self._lap_started = now
        self._idle += self._gap(self._lap_started, now)
        self._given += 1
        self._outputs.put(output)

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them the device had nothing to do."""
        assert self._lap_started is not None, "no step was dispatched"
        now = time.perf_counter()
        seconds = now - self._lap_started
        idle = self._idle + self._gap(self._lap_started, now)
        self._lap_started = now
        self._idle = 0.0
        return seconds, idle

    def restart(self) -> None:
        """Begins the next lap with the next step: after an evaluation, which is no training."""
        self._lap_started = None
        self._idle = 0.0

    def close(self) -> None:
        """Ends the thread."""
        self._outputs.put(None)
        self._thread.join()

    def _gap(self, since: float, now: float) -> float:
        """Seconds for which, by now, the device has been without a step."""
        return now - max(since, self._last_finished) if self._finished == self._given else 0.0

    def _watch(self) -> None:
        while (output := self._outputs.get()) is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the loop meets it too
                output.block_until_ready()
            self._last_finished = time.perf_counter()
            self._finished += 1
