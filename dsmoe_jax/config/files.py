"""Config files: programs with a `get_config(arg)` that returns a `ConfigDict`."""

from __future__ import annotations

import contextlib
import difflib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_collections

REPOSITORY = Path(__file__).resolve().parents[2]


def load(spec: str) -> ml_collections.ConfigDict:
    """Executes a config file: `load("configs/dsmoe_2b.py:demo,shared=2")`.

    Args:
      spec: a path, relative to the current directory or else to the repository that holds this
        package; after a colon the argument of `get_config`, which is called without one if there
        is no colon.

    Raises:
      ValueError: naming the file, if it does not exist, is not a config file, or fails.
    """
    path, colon, arg = spec.partition(":")
    root = _root(path)
    with _importing_from(root, REPOSITORY):
        try:
            get_config = runpy.run_path(str(root / path)).get("get_config")
            if get_config is None:
                raise ValueError("has no get_config(arg), so it is not a config file")
            config = get_config(arg) if colon else get_config()
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"config={spec}: {kind}{error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise ValueError(f"config={spec}: get_config must return a ConfigDict, not {kind}")
    return config


def _root(path: str) -> Path:
    """The directory that `path` is relative to."""
    roots = (Path.cwd(), REPOSITORY)
    for root in roots:
        if (root / path).is_file():
            return root
    known = {
        file.name: f"configs/{file.name}"
        for root in roots
        for file in sorted((root / "configs").glob("*.py"))
    }
    close = difflib.get_close_matches(Path(path).name, known, n=1, cutoff=0.7)
    hint = f"did you mean {known[close[0]]}?" if close else "give one of configs/*.py"
    raise ValueError(f"config={path}: no such file; {hint}")


@contextlib.contextmanager
def _importing_from(*directories: Path) -> Iterator[None]:
    """Lets a config file import its neighbours (`from configs import base`).

    The console script, unlike `python -m`, does not have the current directory on `sys.path`.
    """
    before = list(sys.path)
    sys.path[:0] = map(str, directories)
    try:
        yield
    finally:
        sys.path[:] = before
