"""A package index that is a directory: what fetches from it needs no network."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe_jax.data.fetch import Package


def _make_wheel(directory: Path, members: dict[str, str], name: str = "verse") -> Package:
    """A wheel of version 1.0 in `directory` (made if need be), and its pin."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in {**members, **meta}.items():
            wheel.writestr(member, text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(name, "1.0", path.name, digest, 0.1)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes for its only package index; the cache lies beside it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "index"


@pytest.fixture
def make_wheel() -> Callable[..., Package]:
    """`make_wheel(directory, {member: text})` writes a wheel and returns its pin."""
    return _make_wheel
