"""Standard output as it comes: a terminal without Unicode, a pipe that is closed, a full disk."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

CLOSED = 141  # the exit code of a program that a closed pipe has ended


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Sees to it that all that is printed is written, or that the process says why not.

    Characters that the terminal does not have are escaped.  A pipe that its reader has closed
    (`| head`) ends the process quietly.

    Raises:
      OSError: if standard output cannot be written.
    """
    if sys.stderr is None:  # closed by the shell, 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        if (failure := _failure(sys.stdout)) is not None:
            raise failure
    except OSError as error:
        failures = [error, _failure(sys.stdout), _failure(sys.stderr)]
        if any(isinstance(failure, BrokenPipeError) for failure in failures):
            sys.exit(CLOSED)
        raise


def _failure(stream: TextIO | None) -> OSError | None:
    """The error of a stream that cannot be written; what it holds is thrown away then."""
    if stream is None:  # closed by the shell, too
        return None
    try:
        stream.flush()
    except OSError as error:
        # What it holds would be written, and fail again, when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        error.filename = stream.name
        return error
    return None
