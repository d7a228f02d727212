"""Checkpoints by what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable


class SaveTimer:
    """Says when the next checkpoint may be written, so that all of them take a share of the time.

    The optimal interval grows with the square root of the cost and of the time between failures
    (Young 1974, Daly 2006); nobody knows the latter in advance, so the share is what is set.

    Args:
      share: of the time, between 0 and 1; None: never.
      now: a clock in seconds.
    """

    def __init__(self, share: float | None, now: Callable[[], float] = time.perf_counter):
        self._share = share
        self._now = now
        self._last = now()
        self._cost = 0.0  # so that the first one, whose cost is not known, comes at once

    def is_due(self) -> bool:
        """Whether one may be written now."""
        if self._share is None:
            return False
        return self._now() - self._last >= self._cost / self._share

    def saved(self, seconds: float) -> None:
        """One was written now, and training stood still for so many seconds."""
        self._cost, self._last = seconds, self._now()
