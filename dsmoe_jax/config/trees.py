"""Dataclasses from nested dictionaries, such as a `ConfigDict` or JSON gives."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any

from dsmoe_jax.config.checks import require


def flatten(tree: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def build(cls: type, tree: Any, prefix: str = "") -> Any:
    """A dataclass, with those inside of it, from nested dictionaries.

    Args:
      cls: the dataclass.
      tree: exactly its fields.
      prefix: of the keys in errors.

    Raises:
      ValueError: naming the key for an unknown or missing key or a wrong type.
    """
    require(isinstance(tree, dict), prefix.rstrip(".") or "config", tree, "must be a section")
    hints = typing.get_type_hints(cls)
    for key in tree:
        close = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
        require(key in hints, prefix + key, tree[key], f"no such key; {hint}")
    for key in hints:
        require(key in tree, prefix + key, None, "missing")
    return cls(**{key: _convert(hints[key], tree[key], prefix + key) for key in hints})


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key + ".")
    if isinstance(hint, types.GenericAlias):  # tuple[X, ...]
        require(isinstance(value, (list, tuple)), key, value, "must be a list")
        return tuple(_convert(typing.get_args(hint)[0], item, key) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is hint, key, value, f"must be of type {hint.__name__}")
    return value
