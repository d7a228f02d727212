"""Compiles the CPU kernels of this directory with the system's C++ compiler, once on a machine.

`kernel` makes a function of the library a call in JAX.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
from jaxlib.version import __version__ as jaxlib_version

from dsmoe_jax.hardware.caches import VARIABLE, cache_directory, make_writable

_SOURCES = Path(__file__).parent
# No -ffast-math: it would make a NaN loss look finite, and flush denormals in the whole process.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_FLAGS += ("-fPIC", "-shared", "-mcpu=native" if platform.machine() == "arm64" else "-march=native")


class NotBuilt(ValueError):
    """There is no C++ compiler, it does not compile the kernels, or they cannot be kept."""


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library, from the cache or compiled now (some ten seconds).

    $CXX names the compiler, else it is `c++`.

    Raises:
      NotBuilt: saying what is missing.
    """
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise NotBuilt("no C++ compiler (c++, or what CXX names): install GCC 12, Clang or later")
    try:
        target = cache_directory() / "native" / f"kernels-{_fingerprint(compiler)}.so"
        if not target.exists():
            _compile(compiler, target)
    except (ValueError, OSError) as error:  # a cache that cannot be used
        raise NotBuilt(str(error)) from error
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:  # a damaged file, or a file system that runs no programs
        where = f"set {VARIABLE} to another directory"
        raise NotBuilt(f"{error}; remove that file, or {where}") from error


def _compile(compiler: str, target: Path) -> None:
    logging.getLogger(__name__).info("compiling the CPU kernels, once on this machine")
    make_writable(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:  # never half a library
        fresh = Path(scratch) / target.name
        include = f"-I{jax.ffi.include_dir()}"
        sources = map(str, sorted(_SOURCES.glob("*.cc")))
        _run(compiler, *_FLAGS, "-w", include, *sources, "-o", str(fresh))
        fresh.replace(target)


def kernel(name: str, results, **attributes):
    """`kernel(name, results, k=7)(*arrays)`: a call of the function `name` of the library.

    Args:
      name: as exported by a `.cc` file here.
      results: shapes and dtypes of its results.
      **attributes: its integer attributes.
    """
    call = jax.ffi.ffi_call(_register(name), results, vmap_method="sequential")
    return lambda *arrays: call(*arrays, **{k: np.int64(v) for k, v in attributes.items()})


@functools.cache
def _register(name: str) -> str:
    target = f"dsmoe_{name}"
    function = getattr(library(), name)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return target


def _fingerprint(compiler: str) -> str:
    """Hash of all that decides the machine code: sources, flags, headers, compiler, processor."""
    processor = _run(compiler, _FLAGS[-1], "-dM", "-E", "-x", "c++", os.devnull)
    sources = b"".join(p.read_bytes() for p in sorted(_SOURCES.glob("*.[ch]*")))
    key = sources + repr((_FLAGS, jaxlib_version, processor)).encode()
    return hashlib.sha256(key).hexdigest()[:16]


def _run(*command: str) -> str:
    # Compilers quote in UTF-8, whatever the locale of this process.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        shown = [line for line in lines if "error" in line] or lines
        raise NotBuilt(f"{command[0]} does not compile the kernels: {shown[0].strip()}")
    return done.stdout
