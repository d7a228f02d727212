"""One file a model; `load` finds them by name for experiments, benchmarks and tests."""

from __future__ import annotations

import difflib
import importlib
import pathlib

import ml_collections


def names() -> list[str]:
    """The names of all config files, sorted."""
    return sorted(
        path.stem
        for path in pathlib.Path(__file__).parent.glob("*.py")
        if path.stem not in ("__init__", "base")
    )


def load(name: str, arg: str = "paper") -> ml_collections.ConfigDict:
    """The config of `configs/NAME.py` at a scale: `load("dsmoe_2b", "demo,shared=2")`.

    Raises:
      ValueError: for an unknown name, scale or option.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names())}"
        raise ValueError(f"config={name!r}: there is no configs/{name}.py; {hint}")
    return importlib.import_module(f"configs.{name}").get_config(arg)
