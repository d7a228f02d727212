"""Config files: programs with a `get_config(arg)` that returns a `ConfigDict`."""

from __future__ import annotations

import runpy
from pathlib import Path

import ml_collections

REPOSITORY = Path(__file__).resolve().parents[2]


def load(spec: str) -> ml_collections.ConfigDict:
    """Executes a config file: `load("configs/dsmoe_2b.py:demo,shared=2")`."""
    path, _, arg = spec.partition(":")
    root = Path.cwd() if Path(path).is_file() else REPOSITORY
    if not (root / path).is_file():
        raise ValueError(f"config={path}: no such file")
    return runpy.run_path(str(root / path))["get_config"](arg)
