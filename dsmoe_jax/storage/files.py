"""Files that are written whole, appended to, copied, measured and removed, wherever they are.

A file system has rename and appending; a bucket has neither, but an object appears as a whole, only
a given generation of it is replaced if the writer says so, and objects can be joined to a new one.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dsmoe_jax.storage.away import naming
from dsmoe_jax.storage.places import bucket_and_name, is_address

# Orbax's sign that a checkpoint in a bucket is whole.
COMMITTED = "commit_success.txt"
# Between two appends to an object, unless asked: a bucket takes one change a second of an object.
APPEND_SECONDS = 10.0


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file whose content replaces that of `path` as a whole, once the block has ended.

    Args:
      path: to write.
      sync: whether it must have reached the disk by then.

    Raises:
      OSError: naming the path, if it cannot be written.
    """
    if is_address(path):
        content = io.BytesIO()
        yield content
        upload(path, content.getvalue())
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error


def upload(path: Path, content: bytes) -> None:
    """Writes an object.

    Raises:
      OSError: naming the path, if it cannot be written.
    """
    bucket, name = bucket_and_name(path)
    with naming(path):
        bucket.blob(name).upload_from_string(content, "application/octet-stream")


class Appended(Protocol):
    """A file that is added to.

    `write` returns how many bytes it took; `flush` makes sure that a kill takes none of them.
    """

    def write(self, content: Any, /) -> int: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def appending(path: Path) -> Appended:
    """Opens a file to add to it.

    In a file system what is written is safe from a kill at once; in a bucket after `flush`, `close`
    or a write that comes `APPEND_SECONDS` after the last.
    """
    if is_address(path):
        return AppendedObject(path)
    # Unbuffered: what is written is safe from a kill, and a full disk is noticed.
    return cast(Appended, open(path, "ab", buffering=0))


class AppendedObject:
    """An object of a bucket that is added to: a new piece is joined to its end.

    Only the generation that this writer knows is replaced, so a request that is sent twice adds
    once, and what another writer has done is not lost.
    """

    def __init__(self, path: Path):
        self._path = path
        self._bucket, self._name = bucket_and_name(path)
        # Its name does not begin like the file's: TensorBoard reads all that look like its own.
        folder, _, last = self._name.rpartition("/")
        self._piece = f"{folder}/.{last.partition('.')[0]}.piece"
        with naming(path):
            there = self._bucket.get_blob(self._name)
        self._generation = 0 if there is None else there.generation
        self._size = 0 if there is None else there.size
        self._pending = bytearray()
        self._last = time.monotonic()

    def write(self, content: Any, /) -> int:
        """Takes all of it; raises as `flush`."""
        self._pending += content
        if time.monotonic() - self._last >= APPEND_SECONDS:
            self.flush()
        return len(content)

    def flush(self) -> None:
        """Adds what has been written to the object.

        Raises:
          OSError: naming the path, if it cannot be written or another process has written it.
        """
        if not self._pending:
            return
        with naming(self._path):
            self._append(bytes(self._pending))
        self._pending.clear()
        self._last = time.monotonic()

    def close(self) -> None:
        """Flushes, and removes the last piece; raises as `flush`."""
        self.flush()
        with contextlib.suppress(Exception):  # there may be none; if it stays it does no harm
            self._bucket.blob(self._piece).delete()

    def _append(self, content: bytes) -> None:
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        kind = "application/octet-stream"
        whole = self._size + len(content)
        try:
            if self._generation == 0:
                blob.upload_from_string(content, kind, if_generation_match=0)
            else:
                piece = self._bucket.blob(self._piece)
                piece.upload_from_string(content, kind)
                blob.content_type = kind
                blob.compose([blob, piece], if_generation_match=self._generation)
        except PreconditionFailed:
            blob = self._bucket.get_blob(self._name)
            # Else it was this very request, whose answer was lost and which was sent again.
            if blob is None or blob.size != whole:
                raise OSError("another process has written it") from None
        if blob.size != whole:
            raise OSError(f"has {blob.size} bytes, {whole} were written")
        self._generation, self._size = blob.generation, whole


def copy(source: Path, target: Path) -> None:
    """Copies a file, of a bucket or not.

    Raises:
      OSError: naming the target, if it cannot be written.
    """
    if is_address(source) and is_address(target):
        bucket, name = bucket_and_name(source)
        to, new_name = bucket_and_name(target)
        with naming(target):
            bucket.copy_blob(bucket.blob(name), to, new_name)
        return
    with source.open("rb") as content, replacing(target) as file:
        shutil.copyfileobj(content, file)


def copy_tree(source: Path, target: Path) -> None:
    """Copies all files below a directory to a directory of a file system; raises as `copy`."""
    for name in sizes(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy(source / name, target / name)


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of all files below a directory, by their paths in it."""
    if is_address(directory):
        bucket, name = bucket_and_name(directory)
        with naming(directory, "cannot be read"):
            found = list(bucket.list_blobs(prefix=f"{name}/"))
        named = {blob.name.removeprefix(f"{name}/"): blob.size for blob in found}
        return {name: size for name, size in named.items() if name and not name.endswith("/")}
    files = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {str(p.relative_to(directory)): p.stat().st_size for p in files}


def modified(path: Path) -> float:
    """When a file, or a checkpoint of Orbax, was written: seconds since 1970.

    Raises:
      FileNotFoundError: if it is not there any more.
    """
    if not is_address(path):
        return path.stat().st_mtime
    bucket, name = bucket_and_name(path)
    with naming(path, "cannot be read"):
        blob = bucket.get_blob(name) or bucket.get_blob(f"{name}/{COMMITTED}")
    if blob is None:
        raise FileNotFoundError(os.fspath(path))
    return blob.updated.timestamp()


def is_whole(checkpoint: Path) -> bool:
    """Whether the writing of a directory of Orbax was finished: a file system renames it then."""
    return not is_address(checkpoint) or (checkpoint / COMMITTED).exists()


def remove_tree(directory: Path) -> None:
    """Removes a directory with all that is in it.

    Raises:
      OSError: naming it, if something cannot be removed.
    """
    if not is_address(directory):
        shutil.rmtree(directory)
        return
    from google.api_core.exceptions import NotFound

    bucket, name = bucket_and_name(directory)
    with naming(directory):
        blobs = list(bucket.list_blobs(prefix=f"{name}/"))
        # First: a checkpoint that is removed in part must not look whole.
        blobs.sort(key=lambda blob: blob.name != f"{name}/{COMMITTED}")
        for blob in blobs:
            with contextlib.suppress(NotFound):
                blob.delete()


@contextlib.contextmanager
def local_stand_in(directory: Path) -> Iterator[Path]:
    """A folder of a file system for a library that writes nowhere else; what it has is uploaded.

    A directory of a file system stands for itself.
    """
    if not is_address(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for name in sizes(Path(folder)):
            upload(directory / name, (Path(folder) / name).read_bytes())
