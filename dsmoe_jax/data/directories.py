"""Directories and files that appear only when they are whole, whoever is killed meanwhile."""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path


def make_whole(out: Path, is_there: Callable[[], bool], build: Callable[[Path], None]) -> None:
    """Lets `build` fill a directory beside `out`, and renames it to `out` when it is done.

    One process at a time builds in the directory above; what a killed one left is removed.

    Args:
      out: the directory to make, with those above it.
      is_there: whether it has been made already; asked again after waiting for another process.
      build: fills an empty directory.

    Raises:
      ValueError: if a directory cannot be made.
    """
    if is_there():
        return
    _make_directory(out.parent, parents=True, exist_ok=True)
    with _locked(out.parent):
        # Another process may have made it while this one waited for the lock.
        if not is_there():
            building = out.with_name(f".{out.name}.building")
            shutil.rmtree(building, ignore_errors=True)  # left by a build that was killed
            _make_directory(building)
            try:
                build(building)
                building.replace(out)
            finally:
                shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which then takes the place of `path`.

    Several processes, also of several hosts, may write the same file at once.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_directory(path: Path, **options: bool) -> None:
    try:
        path.mkdir(**options)
    except OSError as error:
        raise ValueError(f"{path}: cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time build in `directory`; the lock dies with it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
