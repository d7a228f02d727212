"""The progress line of a long job, with the time that it will still take."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class ProgressLine:
    """`name 120/250  loss 4.31  ...  ETA 1:05`, updated in place on a terminal.

    Elsewhere (a log file) it is a plain line every now and then.

    Args:
      name: of the job.
      total: amount of work, in the unit of `update`.
      stream: to write to; None: stderr.
      every: seconds between lines, where they are not updated in place.
    """

    def __init__(self, name: str, total: int, stream: TextIO | None = None, every: float = 20.0):
        self._name = name
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._in_place = self._stream.isatty()
        self._every = 0.1 if self._in_place else every
        self._width = 0
        self._first: tuple[int, float] | None = None
        self._last = 0.0
        self._done = 0.0
        self._said: int | None = None  # the number in the last line

    def update(self, done: int, **fields: str) -> None:
        """Says that `done` of the total are done; fields are shown in the order given."""
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)  # the time before may include compilation
            self._last = now
        elif now - self._last >= self._every or done == self._total != self._said:
            self._last = now
            self._said = done
            shown = [f"{key} {value}" for key, value in fields.items()]
            parts = f"{self._name} {done}/{self._total}", *shown, f"ETA {self._eta(done, now)}"
            self._write("  ".join(parts))

    def add(self, amount: float) -> None:
        """Says that this much more is done."""
        self._done += amount
        self.update(round(self._done))

    def note(self, text: str) -> None:
        """Says what goes on outside the steps, where the line is updated in place."""
        if self._in_place:
            self._write(f"{self._name}: {text}")

    def message(self, text: str) -> None:
        """Writes a line of its own, which stays."""
        self._end_line()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line."""
        self._end_line()

    def _eta(self, done: int, now: float) -> str:
        assert self._first is not None
        start, since = self._first
        seconds = round((self._total - done) * (now - since) / max(done - start, 1))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def _write(self, line: str) -> None:
        if self._in_place:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _end_line(self) -> None:
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


class Silent(ProgressLine):
    """A progress line that writes nothing."""

    def __init__(self) -> None:
        super().__init__("", 0)

    def _write(self, line: str) -> None:
        pass

    def message(self, text: str) -> None:
        """Writes nothing."""


def duration(seconds: float) -> str:
    """A readable time: 42 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
