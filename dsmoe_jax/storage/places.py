"""Places as users write them: a path of a file system, or gs://BUCKET/FOLDER.

A place in a bucket is an `epath.Path`, which answers what a `pathlib.Path` answers, so that those
who read and write a workdir need not ask where it is.  They open files by `path.open()`, since the
built-in `open` knows no buckets, and write by storage/files.py, since a bucket knows no rename and
no appending.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import Any, cast

from dsmoe_jax.config.paths import ADDRESS, local_path
from dsmoe_jax.storage import gcs_files
from dsmoe_jax.storage.away import Away, first_line, is_away

_SCHEME = "gs"
# `Path` makes gs:/bucket of gs://bucket.
_IN_BUCKET = re.compile(rf"{_SCHEME}:/{{1,2}}(?P<bucket>[^/]+)/+(?P<name>.*[^/])/*")
# What the libraries need that read and write a bucket, and the extra that has them.
_NEEDED = ("gcsfs", "google.cloud.storage")
_EXTRA = "gcs"
_SECONDS = 30.0  # that a bucket may take to answer at first


def place_of(key: str, written: str | os.PathLike[str]) -> Path:
    """The place that a user means: an absolute path, or a folder or file in a bucket.

    Args:
      key: what the user calls it: "--workdir", "data.corpus".
      written: its value.

    Raises:
      ValueError: naming the key, for an address of another kind, a bucket that is missing or must
        not be read, or if a package or credentials are missing, and as `local_path`.
      Away: naming the key, if the bucket does not answer.
    """
    text = os.fspath(written)
    if not is_address(text):
        if ADDRESS.match(text):
            raise ValueError(
                f"{key}={text}: must be a path of a mounted file system, or gs://BUCKET/FOLDER"
            )
        return local_path(key, text)
    found = _IN_BUCKET.fullmatch(text)
    if found is None or any(part in (".", "..") for part in found["name"].split("/")):
        raise ValueError(f"{key}={text}: must name a folder of a bucket, as in gs://bucket/run")
    _check_packages(key, text)
    _check_bucket(key, text, found["bucket"])
    return _in_bucket(f"{_SCHEME}://{found['bucket']}/{found['name']}")


def is_address(written: str | os.PathLike[str]) -> bool:
    """Whether a place is in a bucket by the way that it is written."""
    return os.fspath(written).startswith(f"{_SCHEME}:/")


def bucket_and_name(path: Path) -> tuple[Any, str]:
    """The bucket of a place, for google-cloud-storage, and the name of the object in it."""
    found = _IN_BUCKET.fullmatch(os.fspath(path))
    assert found is not None, path
    return bucket(found["bucket"]), found["name"]


@functools.cache
def bucket(name: str) -> Any:
    """A bucket, as google-cloud-storage has it; asks nothing of it."""
    return _client().bucket(name)


@functools.cache
def _client() -> Any:
    from google.cloud import storage

    return storage.Client()


def _in_bucket(address: str) -> Path:
    import fsspec.config
    from etils import epath

    # Other processes write too: a listing that is kept would hide what they have written.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    gcs_files.register()
    return cast(Path, epath.Path(address))


def _check_packages(key: str, text: str) -> None:
    try:
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    except ModuleNotFoundError as error:  # of the folder google.cloud
        missing = [str(error.name)]
    if missing:
        raise ValueError(
            f"{key}={text}: buckets need the package {missing[0]};"
            f" pip install 'dsmoe_jax[{_EXTRA}]' installs it"
        )


def _check_bucket(key: str, text: str, name: str) -> None:
    try:
        wrong = _wrong_with(name)
    except Away as error:
        raise Away(f"{key}={text}: {error}") from error
    if wrong is not None:
        raise ValueError(f"{key}={text}: {wrong}")


@functools.cache
def _wrong_with(name: str) -> str | None:
    """The reason why a bucket cannot be read; None if it can.

    Raises:
      Away: if it does not answer, which is not remembered.
    """
    from google.api_core import exceptions, retry
    from google.auth.exceptions import GoogleAuthError

    try:
        # Orbax asks this too, and would end in pages.
        _client().get_bucket(name, timeout=_SECONDS, retry=retry.Retry(timeout=_SECONDS))
    except exceptions.NotFound:
        return f"there is no bucket {name}"
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        return (
            f"the bucket {name} must not be read by these credentials ({first_line(error)}); they"
            " need storage.buckets.get, and storage.objects.get, list, create and delete"
        )
    except (GoogleAuthError, exceptions.GoogleAPIError, OSError) as error:
        if is_away(error):
            raise Away(f"the bucket {name} does not answer ({first_line(error)})") from error
        if isinstance(error, GoogleAuthError):
            return (
                f"there are no credentials for Google Cloud ({first_line(error)}); gcloud auth"
                " application-default login makes some"
            )
        return f"the bucket {name} cannot be asked ({first_line(error)})"  # there is no project
    return None
