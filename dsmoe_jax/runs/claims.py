"""Keeping a workdir to one trainer.

In a file system the trainer locks a file, and the lock ends with its process.

A bucket has no locks.  There the claim is an object, `.lock`, that names its holder.  It is written
only in place of the generation that the writer has read, so of two trainers one comes first.  The
holder writes it anew every `BEAT_SECONDS`.  A claim that does not change for `DEAD_SECONDS`, by the
watch of the one who waits for it, is of a trainer that is gone, and is taken over; a holder that
could not write for so long ends its process before.  No clocks of two machines are compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsmoe_jax.storage.away import Away, away, first_line, is_away, naming
from dsmoe_jax.storage.places import bucket_and_name, is_address

LOCK = ".lock"
BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0


class InUse(ValueError):
    """Another process holds the workdir."""


def held(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Holds a workdir for this process; makes the directory if it is missing.

    Raises:
      ValueError: if it cannot be written, and `InUse`.
      Away: if it is in a bucket that does not answer.
    """
    return _held_in_bucket(directory) if is_address(directory) else _locked(directory)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Unbuffered: closing it has nothing left to write, which could fail.
        lock = open(directory / LOCK, "a+b", buffering=0)  # noqa: SIM115 - held below
    except OSError as error:
        raise _not_writable(directory, error.strerror) from error
    with lock:
        _take(lock, directory)
        yield


def _take(lock: BinaryIO, directory: Path) -> None:
    """Locks a workdir for this process, and notes which one it is."""
    try:
        _lock(lock)
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
    except BlockingIOError:
        lock.seek(0)
        process = lock.read().decode(errors="replace").strip() or "unknown"
        raise InUse(_in_use(directory, f"process {process}")) from None
    except OSError as error:
        raise _not_writable(directory, error.strerror) from error


def _lock(lock: BinaryIO, seconds: float = 0.2) -> None:
    """Locks a file; tries again for a moment, since `holder` looks with a lock of its own."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(seconds / 10)


def holder(directory: Path) -> str | None:
    """The process that trains in a workdir now, by its number; None if there is none.

    In a bucket its host is named too, and one that was killed a moment ago may still be.
    """
    if is_address(directory):
        with naming(directory, "cannot be read"):
            _, found = _Claim(directory)._read()
        return _named(found).removeprefix("process ") if _may_live(found) else None
    try:
        with open(directory / LOCK, "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().decode(errors="replace").strip() or "unknown"
    except OSError:  # there is no lock, or it cannot be read
        pass
    return None


def _in_use(directory: Path, holder: str) -> str:
    return f"--workdir={directory}: in use by {holder}; wait for it or choose another directory"


def _not_writable(directory: Path, reason: Any) -> ValueError:
    return ValueError(f"--workdir={directory}: cannot be written: {reason}")


@contextlib.contextmanager
def _held_in_bucket(directory: Path) -> Iterator[None]:
    claim = _Claim(directory)
    claim.take()
    beating = threading.Thread(target=claim.beat, name="claim", daemon=True)
    beating.start()
    try:
        yield
    finally:
        claim.over.set()
        beating.join()
        claim.release()


class _Claim:
    """The object that says who holds a workdir in a bucket."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._bucket, self._name = bucket_and_name(directory / LOCK)
        self._generation = 0  # of the object that this claim may be written in place of
        self._written = time.monotonic()
        self._holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "claim": secrets.token_hex(8),
        }
        self.over = threading.Event()

    def take(self) -> None:
        """Takes the claim, if nobody holds it or the holder is gone."""
        from google.api_core.exceptions import GoogleAPIError, PreconditionFailed
        from google.auth.exceptions import GoogleAuthError

        watched: int | None = None
        until = 0.0
        while True:
            try:
                self._generation, holder = self._read()
                if _may_live(holder):
                    if watched is None:
                        watched, until = self._generation, time.monotonic() + DEAD_SECONDS
                        self._say_waiting(holder)
                    if self._generation != watched:
                        raise InUse(_in_use(self._directory, _named(holder)))
                    if time.monotonic() < until:
                        time.sleep(min(1.0, BEAT_SECONDS / 2))
                        continue
                self._write(self._holder)
                return
            except PreconditionFailed:  # another one was faster
                continue
            except (GoogleAPIError, GoogleAuthError, OSError) as error:
                if is_away(error):
                    raise away(f"--workdir={self._directory}", error) from error
                raise _not_writable(self._directory, first_line(error)) from error

    def beat(self) -> None:
        """Writes the claim anew until it is over; ends the process if it is another's now."""
        from google.api_core.exceptions import PreconditionFailed

        while not self.over.wait(BEAT_SECONDS):
            try:
                self._write(self._holder)
            except PreconditionFailed:
                self._settle()
            except Exception as error:  # whatever the network does
                # Before another one may take it over: what this one writes then would do harm.
                if time.monotonic() - self._written > DEAD_SECONDS - 2 * BEAT_SECONDS:
                    why = f"the bucket does not answer ({first_line(error)})"
                    self._end(why, Away.exit_code)

    def release(self) -> None:
        """Leaves the claim to anyone; one that cannot be written will be found dead."""
        # Written, not deleted: it is not the one to delete if another process holds it.
        with contextlib.suppress(Exception):
            self._write(None)

    def _settle(self) -> None:
        """The claim is of an unknown generation: another's, or this one's whose answer was lost."""
        with contextlib.suppress(Exception):
            generation, holder = self._read()
            if holder is not None and holder.get("claim") == self._holder["claim"]:
                self._generation = generation
                return
            self._end(f"it was taken over by {_named(holder)}")

    def _end(self, why: str, code: int = 2) -> None:
        print(
            f"error: --workdir={self._directory}: {why}; the same command goes on from the last"
            " checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(code)  # nothing more may be written, by no thread

    def _read(self) -> tuple[int, dict[str, Any] | None]:
        """The generation of the object, 0 if there is none, and its holder."""
        blob = self._bucket.get_blob(self._name, timeout=BEAT_SECONDS)
        if blob is None:
            return 0, None
        try:
            holder = json.loads(blob.download_as_bytes(timeout=BEAT_SECONDS))
        except ValueError:
            holder = {}  # it may be of another version, and alive
        return blob.generation, holder if isinstance(holder, dict) or holder is None else {}

    def _write(self, holder: dict[str, Any] | None) -> None:
        began = time.monotonic()
        blob = self._bucket.blob(self._name)
        blob.upload_from_string(
            json.dumps(holder),
            "application/json",
            if_generation_match=self._generation,
            timeout=BEAT_SECONDS,
            retry=None,
        )
        self._generation = blob.generation
        self._written = began

    def _say_waiting(self, holder: dict[str, Any] | None) -> None:
        print(
            f"--workdir={self._directory}: held by {_named(holder)}; waiting for up to"
            f" {DEAD_SECONDS:.0f} seconds to see whether it lives",
            file=sys.stderr,
            flush=True,
        )


def _may_live(holder: dict[str, Any] | None) -> bool:
    """Whether a holder may be alive: there is one, and it is no process of this machine that ended.

    After a crash the same command on the same machine need not wait.
    """
    if holder is None:
        return False
    process, machine = holder.get("process"), holder.get("machine")
    if machine is None or machine != _machine() or type(process) is not int:
        return True
    try:
        state = (
            Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        )
    except OSError:
        return False
    return state[0] not in ("Z", "X")  # ended, though its parent has not asked how


def _machine() -> str | None:
    """This start of this machine, and which of its containers; None where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _named(holder: dict[str, Any] | None) -> str:
    holder = holder or {}
    return f"process {holder.get('process', 'unknown')} on {holder.get('host', 'unknown')}"
