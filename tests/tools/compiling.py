"""Compiling quickly: what tests compile is run a few times, and need not be fast."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache

# XLA's older emitters compile in a third of the time.  It reads its flags when JAX is first used.
FLAG = "--xla_cpu_use_fusion_emitters=false"


def set_flag() -> None:
    """Gives XLA the flag, in this process (if JAX has not been used) and those that it starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}"


@contextlib.contextmanager
def compiling_quickly(cache: Path) -> Iterator[None]:
    """Compiles with little optimisation, and each program once: it is kept in a directory.

    Processes that are started meanwhile do so too.
    """
    changes = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    environment = {key.upper(): str(value) for key, value in changes.items()}
    with mock.patch.dict(os.environ, environment), jax_settings(**changes):
        compilation_cache.reset_cache()  # else JAX does not look at the directory
        yield
    compilation_cache.reset_cache()


@contextlib.contextmanager
def jax_settings(**changes: Any) -> Iterator[None]:
    """Changes settings of JAX, and changes them back."""
    before = {key: _read(key) for key in changes}
    try:
        for key, value in changes.items():
            jax.config.update(key, value)
        yield
    finally:
        for key, value in before.items():
            jax.config.update(key, value)


def _read(key: str) -> Any:
    """JAX hands out some settings as attributes and the others by `read`."""
    return getattr(jax.config, key) if hasattr(jax.config, key) else jax.config.read(key)
