"""The directory of this machine for what can be downloaded or built again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dsmoe_jax.config.paths import local_path

VARIABLE = "DSMOE_CACHE"


def cache_directory() -> Path:
    """$DSMOE_CACHE, or ~/.cache/dsmoe_jax: corpora and compiled kernels.

    Raises:
      ValueError: naming the variable, if there is no such path.
    """
    return local_path(VARIABLE, os.environ.get(VARIABLE) or "~/.cache/dsmoe_jax")


def make_writable(directory: Path) -> None:
    """Makes a directory in the cache, if it is missing.

    Raises:
      ValueError: naming the variable, if it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"{VARIABLE}={cache_directory()}: cannot be written ({error.strerror}); set"
            f" {VARIABLE} to a directory that can"
        ) from error
