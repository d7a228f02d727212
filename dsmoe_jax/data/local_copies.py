"""Copies of what lies in a bucket, in the cache of this machine: each object is fetched once.

Readers of ArrayRecord, Parquet and text want files.  A copy stands under a name that says which
generation of every object it is of, so what has changed in the bucket is fetched anew, and what has
not is not.  Each file is checked against the checksum that the bucket has of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from dsmoe_jax.data.directories import make_whole
from dsmoe_jax.hardware.caches import cache_directory, make_writable
from dsmoe_jax.storage.away import naming
from dsmoe_jax.storage.places import bucket_and_name, is_address, place_of

FOLDER = "fetched"  # in the cache


def local_copy(key: str, written: str) -> Path:
    """The path of a file or folder on this machine; of one in a bucket that of its copy.

    Args:
      key: what the user calls it, for errors.
      written: a path or an address.

    Raises:
      ValueError: naming the key, if there is nothing at an address or it is damaged on its way, and
        as `place_of`.
      OSError: naming the key, if it cannot be fetched; `Away` if the bucket does not answer.
    """
    path = place_of(key, written)
    if not is_address(path):
        return path
    bucket, name = bucket_and_name(path)
    with naming(f"{key}={path}", "cannot be fetched"):
        blobs = _objects(bucket, name)
    if not blobs:
        raise ValueError(f"{key}={written}: there is no such file or folder in the bucket")
    content = [[blob.name, blob.size, blob.crc32c] for blob in blobs]
    digest = hashlib.sha256(json.dumps([str(path), content]).encode()).hexdigest()[:16]
    directory = cache_directory() / FOLDER / digest
    copy = directory / path.name
    if not copy.exists():
        make_writable(directory.parent)
        make_whole(directory, directory.exists, lambda made: _fetch(blobs, name, made, key, path))
    return copy


def _objects(bucket: Any, name: str) -> list[Any]:
    """The object of a name, or those below it."""
    one = bucket.get_blob(name)
    if one is not None:
        return [one]
    below = bucket.list_blobs(prefix=f"{name}/")
    return [blob for blob in below if not blob.name.endswith("/")]


def _fetch(blobs: list[Any], name: str, made: Path, key: str, path: Path) -> None:
    needed = sum(blob.size for blob in blobs)
    free = shutil.disk_usage(made).free
    if free < needed:
        raise ValueError(
            f"{key}={path}: {needed / 1e6:,.0f} MB are needed in {cache_directory()},"
            f" {free / 1e6:,.0f} MB are free"
        )
    print(f"fetching {path} ({needed / 1e6:,.1f} MB)", file=sys.stderr, flush=True)
    for blob in blobs:
        below = blob.name.removeprefix(name).strip("/")
        if ".." in below.split("/"):  # a bucket takes any name; this one would leave the folder
            raise ValueError(f"{key}={path}: {blob.name}: no name of a file")
        file = made / path.name / below if below else made / path.name
        file.parent.mkdir(parents=True, exist_ok=True)
        with naming(f"{key}={path}: {blob.name}", "cannot be fetched; try again"):
            blob.download_to_filename(str(file), if_generation_match=blob.generation, checksum=None)
        if _crc32c(file) != blob.crc32c:  # by itself the library checks it only if it is sent along
            raise ValueError(
                f"{key}={path}: {blob.name} is damaged on its way; the same command tries again"
            )


def _crc32c(file: Path) -> str:
    """The checksum of a file, as a bucket says it."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with file.open("rb") as content:
        for _ in checksum.consume(content, 2**20):
            pass
    return base64.b64encode(checksum.digest()).decode("ascii")
