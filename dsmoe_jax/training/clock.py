"""The share of the time in which the device is idle, and the times of single steps."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque

import jax
import numpy as np

WINDOW = 1000  # steps that percentiles are of
PERCENTILES = (50, 95, 99)


class DeviceClock:
    """Sees each step handed to the device and each step finished, and adds up the gaps.

    A thread waits for every step's output, so that the moment a step ends is known although the
    host is busy with something else then.
    """

    def __init__(self) -> None:
        self._outputs: queue.Queue[tuple[jax.Array, float | None] | None] = queue.Queue()
        self._steps: deque[float] = deque(maxlen=WINDOW)  # their seconds
        self._given = self._finished = 0  # steps
        self._last_finished = 0.0  # when
        self._lap_started: float | None = None
        self._idle = 0.0  # of this lap
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def dispatched(self, output: jax.Array) -> None:
        """A step was just handed to the device; `output` is one of its results."""
        now = time.perf_counter()
        first = self._lap_started is None
        if self._lap_started is None:
            self._lap_started = now
        self._idle += self._gap(self._lap_started, now)
        self._given += 1
        self._outputs.put((output, now if first else None))

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them the device had nothing to do."""
        assert self._lap_started is not None, "no step was dispatched"
        now = time.perf_counter()
        seconds = now - self._lap_started
        idle = self._idle + self._gap(self._lap_started, now)
        self._lap_started = now
        self._idle = 0.0
        return seconds, idle

    def percentiles(self) -> dict[str, float]:
        """Seconds of a step, {p50, p95, p99}, of the last 1000 steps; empty before the first.

        A step lasts from the end of the one before it to its own: with what its host did between
        them, such as saving, but without evaluations.
        """
        steps = list(self._steps)
        if not steps:
            return {}
        found = np.percentile(steps, PERCENTILES)
        return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}

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
        while (given := self._outputs.get()) is not None:
            output, began = given
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the loop meets it too
                output.block_until_ready()
            now = time.perf_counter()
            self._steps.append(now - (self._last_finished if began is None else began))
            self._last_finished = now
            self._finished += 1
