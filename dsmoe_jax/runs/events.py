"""The events of a run, `events.jsonl`: when it started, went on, stopped, failed, and why.

A line is an event: `time` (seconds since 1970), `event`, `step` (updates made by then; null before
the first), and details.  Unlike the rows of metrics.jsonl, which are of steps and are cut when a
run goes back, events are of moments, and all of them stay.  Reading takes any event, known or not.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs import json_files
from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import is_address

EVENTS_FILE = "events.jsonl"

START = "start"  # a new run: `hosts`, one name a process
RESUME = "resume"  # from a checkpoint: `hosts`
STAGE = "stage"  # the next steps are of another stage
CHECKPOINT = "checkpoint"  # its arrays are handed over to be written
EVALUATION = "evaluation"  # `loss` on held-out text
STOPPED = "stopped"  # by `signal`, everything saved: preemption, the end of an allocation, Ctrl-C
FAILED = "failed"  # with `error`
SPIKE = "spike"  # see training/spikes.py
END = "end"  # finished: `loss` on held-out text


class Journal:
    """Writes the events of one call of `train`; of several processes the first one writes.

    Attributes:
      step: updates made so far, of the events to come; None before the first.
    """

    def __init__(self, workdir: Path):
        self.step: int | None = None
        self._path = workdir / EVENTS_FILE

    def add(self, event: str, **details: Any) -> None:
        """Adds an event.

        Raises:
          OSError: naming the file, if the disk is full.
        """
        if not hosts.is_first():
            return
        row = {"time": time.time(), "event": event, "step": self.step, **details}
        line = (json_files.dumps(row) + "\n").encode()
        try:
            if is_address(self._path):  # which takes lines as a whole
                with contextlib.closing(files.appending(self._path)) as added:
                    added.write(line)
                return
            with open(self._path, "a+b", buffering=0) as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a kill has cut the line before
                        line = b"\n" + line
                file.write(line)
        except OSError as error:
            if error.strerror is None:  # of a bucket, and named
                raise
            raise OSError(f"{self._path}: cannot be written: {error.strerror}") from error

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Notes an exception, which goes on its way.  (A `Stopped` run has noted that itself.)"""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            with contextlib.suppress(OSError):  # the disk may be what has failed
                self.add(FAILED, error=" ".join(str(error).split()) or type(error).__name__)
            raise


def read_events(workdir: Path) -> list[dict[str, Any]]:
    """All events of a run in order; of a run from before there were events none.

    A line that is no event is left out: a kill may have cut it.

    Raises:
      OSError: if the file cannot be read.
    """
    path = workdir / EVENTS_FILE
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json_files.parse(line, str(path))
            if isinstance(row.get("event"), str) and isinstance(row.get("time"), int | float):
                found.append(row)
    return found
