"""Directories that are made whole or not at all.

What is made lies beside its place under another name until it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsmoe_jax.config.paths import local_path


def new(directory: str, flag: str) -> Path:
    """The path of a directory that is to be made.

    Args:
      directory: must not exist, or be empty.
      flag: that names it, for errors: "--to".

    Raises:
      ValueError: if there is something in it.
    """
    path = local_path(flag, directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{flag}={directory}: exists already; name a new or empty directory")
    return path


@contextlib.contextmanager
def beside(place: Path) -> Iterator[Path]:
    """A directory under another name, which gets the right one when it is whole.

    Raises:
      OSError: naming the place, if it cannot be written.
    """
    made = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        made.mkdir(parents=True)
        yield made
        if place.is_dir():
            place.rmdir()  # it is empty
        made.rename(place)
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(f"{place}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_space(place: Path, needed: int) -> None:
    """Refuses to begin on a disk that is too full.

    Args:
      place: of the directory that is to be made.
      needed: bytes.

    Raises:
      OSError: with the numbers.
    """
    there = next(path for path in place.parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{place}: {needed / 1e9:,.2f} GB of disk are needed, {free / 1e9:,.2f} GB are free"
        )
