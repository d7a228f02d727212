"""SIGTERM and Ctrl-C end a run between two steps, with everything saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax


class Stopped(SystemExit):
    """The run was asked to stop and has saved; uncaught, it ends the process with 128 + signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class Interrupts:
    """While entered, the first SIGTERM or Ctrl-C is only noted; a second Ctrl-C ends at once.

    Outside the main thread, where Python has no signals, nothing is changed.

    Attributes:
      noted: the signal that this process was sent, 0 for none.
      signum: the one that all processes of the run know of, and stop for; None for none.
    """

    def __init__(self) -> None:
        self.noted = 0
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def hear(self, signum: int) -> None:
        """Notes the signal that all processes have agreed on: see `hosts.Vote`."""
        self.signum = self.signum or signum or None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.noted and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = signum
        if jax.process_count() == 1:
            self.hear(signum)
