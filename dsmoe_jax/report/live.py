"""The writer of a run's page, `WORKDIR/report.html`, while the run is on its way.

It works beside the training loop: in a thread of its own, and so seldom that it takes a fiftieth of
a core at most.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from dsmoe_jax.config import Config

SHARE = 0.02  # of the time, at most, in which a page is being drawn


class LiveReport:
    """Writes the page of a run, now and then while it trains, and when it ends.

    Args:
      seconds: between two pages, at least.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next = 0.0
        self._thread: threading.Thread | None = None
        self._last: tuple[Path, Config, list[dict[str, Any]]] | None = None

    def look(self, directory: Path, config: Config, rows: list[dict[str, Any]]) -> None:
        """Takes note of a new row, and begins a page if it is time.

        Args:
          directory: the workdir.
          config: of the run.
          rows: of this run so far.
        """
        self._last = directory, config, rows
        if time.monotonic() < self._next or (self._thread and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._write, args=(directory, config, list(rows)))
        self._thread.start()

    def close(self) -> None:
        """Writes the last page: how the run ended."""
        if self._thread is not None:
            self._thread.join()
        if self._last is not None:
            self._write(*self._last)

    def _write(self, directory: Path, config: Config, rows: list[dict[str, Any]]) -> None:
        # Here, because matplotlib is imported: a second, which the first step need not wait for.
        from dsmoe_jax.report import live_page

        began = time.monotonic()
        try:
            live_page.write(directory, config, rows, self._seconds)
        except OSError as error:  # a full disk ends a run where its numbers are lost, not here
            print(f"warning: {error}", file=sys.stderr)
        ended = time.monotonic()
        self._next = ended + max(self._seconds, (ended - began) / SHARE)
