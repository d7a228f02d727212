"""A cache that cannot be used: what needs it says which variable to set, the rest goes on."""

import logging

import jax.numpy as jnp
import pytest

from dsmoe_jax.hardware.caches import cache_directory, make_writable
from dsmoe_jax.moe import kernels
from dsmoe_jax.moe.experts import BACKENDS, check_backend, choose_backend
from dsmoe_jax.moe.kernels import native
from dsmoe_jax.moe.kernels.native import build


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    """A file where the cache should be; also for users who may write everywhere."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "file/cache"))
    forget(monkeypatch)
    return tmp_path / "file/cache"


def forget(monkeypatch):
    """Looks for the compiled kernels again, in this test only."""
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(native, "library", build.library)
    monkeypatch.setattr(native, "is_there", native.is_there.__wrapped__)


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DSMOE_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.setenv("DSMOE_CACHE", "")
    assert cache_directory() == tmp_path / ".cache/dsmoe_jax"
    monkeypatch.setenv("DSMOE_CACHE", "gs://bucket/cache")
    with pytest.raises(ValueError, match=r"^DSMOE_CACHE=gs://bucket/cache: must be a path"):
        cache_directory()


def test_what_needs_it_names_the_variable(unwritable):
    message = rf"^DSMOE_CACHE={unwritable}: cannot be written \(Not a directory\); set DSMOE_CACHE"
    with pytest.raises(ValueError, match=message):
        make_writable(unwritable / "corpora")


def test_auto_goes_on_with_blocked(unwritable, caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", jnp.dtype("float32")) is BACKENDS["blocked"]
    (line,) = caplog.messages
    assert line.startswith("model.moe.expert_backend: 'blocked' (")
    assert "set DSMOE_CACHE to a directory that can" in line
    assert kernels.choose_rows("auto", jnp.dtype("float32")) is kernels.JAX_ROWS
    with pytest.raises(ValueError, match=r"='native': .*set DSMOE_CACHE .*, or choose 'blocked'$"):
        check_backend("native")


def test_a_damaged_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_fingerprint", lambda compiler: "x")
    monkeypatch.setattr(build.shutil, "which", lambda name: "c++")
    forget(monkeypatch)
    (tmp_path / "native").mkdir()
    (tmp_path / "native/kernels-x.so").write_bytes(b"half")
    with pytest.raises(native.NotBuilt, match=r"kernels-x\.so: .*; remove that file, or set DSMOE"):
        build.library()
