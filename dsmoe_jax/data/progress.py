"""A progress line with the time left, on stderr."""

import sys
import time
from types import TracebackType


class Progress:
    """`with Progress("encoding", total, "MB") as progress: progress.add(n)`.

    Silent for the first second, so that short steps print nothing.
    """

    def __init__(self, label: str, total: float, unit: str, quiet_seconds: float = 1.0):
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self._start = time.monotonic()
        self._next = self._start + quiet_seconds
        self._printed = False

    def add(self, amount: float) -> None:
        """Count `amount` more of `total` as done."""
        self.done += amount
        now = time.monotonic()
        if now >= self._next and self.done:
            left = (now - self._start) * (self.total - self.done) / self.done
            self._print(f"{left:.0f} s left")
            self._next = now + 0.5

    def _print(self, note: str) -> None:
        line = f"{self.label}: {self.done:.1f} / {self.total:.1f} {self.unit}, {note}"
        sys.stderr.write(f"\r{line:<78}")
        sys.stderr.flush()
        self._printed = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._printed:
            if kind is None:
                self._print(f"took {time.monotonic() - self._start:.1f} s")
            sys.stderr.write("\n")
