"""Paths as users write them."""

from __future__ import annotations

import os
import re
from pathlib import Path

ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/")  # one slash: `Path` makes gs:/bucket of gs://bucket


def local_path(key: str, written: str | os.PathLike[str]) -> Path:
    """The absolute path that a user means, where `~` is the home directory.

    Every path of a flag, a config key or a variable goes through here; those that may be in a
    bucket by `storage.places.place_of`.

    Args:
      key: what the user calls it: "--out", "data.corpus", "DSMOE_CACHE".
      written: its value.

    Raises:
      ValueError: for an empty path, an address of storage that is no file system (s3://bucket), or
        the home directory of nobody.
    """
    text = os.fspath(written)
    if not text or "\0" in text:
        raise ValueError(f"{key}={text!r}: must be a path")
    if ADDRESS.match(text):
        raise ValueError(
            f"{key}={text}: must be a path of a mounted file system; only workdirs and corpora may"
            " be at gs://BUCKET/FOLDER"
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError(
            f"{key}={text}: there is no such home directory; a name of a file begins with ./~"
        ) from None
