"""The numbers of a run for TensorBoard: event files.

They are written by the run itself.  The thread of tensorboardX's own `SummaryWriter` ends at a full
disk without a word, and the run would wait for it forever.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import place_of

# Limits of the histogram of load / mean load; TensorBoard's own 1549 cost more than all the rest.
FAIR_SHARES: Any = np.append(np.linspace(0, 8, 33), 1e6)
_FLUSH_SECONDS = 30


class Board:
    """Writes event files; values of an earlier call past the step are not shown any more.

    Args:
      directory: made if missing.
      step: that the run continues from.

    Raises:
      OSError: naming the directory, if the disk is full; `add` and `close` too.
    """

    def __init__(self, directory: Path, step: int):
        # Here, because only the first process writes, and it imports torch where there is one: 2 s.
        from tensorboardX import record_writer
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore - made at run time

        # Its own writer to a bucket sends the whole file again each time.
        record_writer.register_writer_factory("gs", _Appending())

        self._directory = directory
        self._flushed = time.monotonic()
        with self._named():
            directory.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(directory / "events"))
            # TensorBoard hides what earlier files have from this step on.
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))
            self._events.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Adds the numbers of a row of metrics.jsonl."""
        from tensorboardX import summary
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore - made at run time

        # One event for all of them: one for each takes twenty times as long.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        for i, load_E in enumerate(row.get("load", [])):
            if any(load_E):
                shares_E = np.array(load_E) / np.mean(load_E)
                histogram = summary.histogram(f"load/layer_{i}", shares_E, FAIR_SHARES)
                values += histogram.value
        with self._named():
            self._write(row["step"], summary=Summary(value=values))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        with self._named():
            self._events.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore - made at run time

        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.strerror is None:  # of a bucket, and named
                raise
            raise OSError(f"{self._directory}: cannot be written: {error.strerror}") from error


class _Appending:
    """Opens event files in a bucket for tensorboardX."""

    def open(self, path: str) -> files.Appended:
        return files.appending(place_of("tensorboard", path))


def scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """Curves: the numbers, and one for each layer, host or name of a list or a section of them."""
    found = []
    for key, value in row.items():
        if isinstance(value, (int, float)) and key != "step":
            found.append((key, value))
        elif isinstance(value, list) and all(isinstance(v, (int, float)) for v in value):
            part = "host" if key.startswith("host_") else "layer"
            found += [(f"{key}/{part}_{i}", v) for i, v in enumerate(value)]
        elif isinstance(value, dict):  # of numbers; domains, which have sections, are left out
            numbers = {k: v for k, v in value.items() if isinstance(v, (int, float))}
            found += [(f"{key}/{name}", v) for name, v in numbers.items()]
    return found
