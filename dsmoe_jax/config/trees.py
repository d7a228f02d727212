"""Dataclasses to nested dictionaries and back, and single values in them by dotted key.

A tree is what a `ConfigDict` or JSON gives: dictionaries, lists or tuples, numbers, strings, None.
The type hints of the dataclasses say what may be where:

    int, float, str, bool, tuple[...]    a value; an int is taken for a float
    X | None                             None is "none of it": no dropping, no schedule
    another dataclass                    a section
    FrozenDict[str, X]                   sections or values by a name that the config does not know,
                                         such as the balance terms; None takes one out
    FrozenDict[str, tuple[Any, ...]]     values by dotted key (the columns of `train.stages`)
    FrozenDict[str, Any]                 the same, of any kind (`data.mixture`)
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from dsmoe_jax.config.checks import number, require
from dsmoe_jax.config.frozen import FrozenDict

Tree = dict[str, Any]


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_tree(section: Any) -> Any:
    """A dataclass as nested dictionaries."""
    if dataclasses.is_dataclass(section):
        return {f.name: to_tree(getattr(section, f.name)) for f in dataclasses.fields(section)}
    if isinstance(section, dict):
        tree: Tree = {}
        for key, value in section.items():
            *path, leaf = key.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = to_tree(value)
        return tree
    return section


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields; evaluating them takes as long as making it."""
    return typing.get_type_hints(cls)


def build(cls: type, tree: Any, prefix: str = "") -> Any:
    """A dataclass, with the sections in it, from nested dictionaries.

    Args:
      cls: the dataclass.
      tree: a value for each of its fields.
      prefix: dotted key of the section, ending in a dot, for errors.

    Raises:
      ValueError: naming the key for an unknown or missing key, a wrong type or a wrong value.
    """
    require(isinstance(tree, dict), prefix.rstrip(".") or "config", tree, "must be a section")
    hints = _hints(cls)
    for key in filter(lambda key: key not in hints, tree):
        # Looked for only now: for every key it took most of the time of making a config.
        close = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
        require(False, prefix + key, tree[key], f"no such key; {hint}")
    for key in hints:
        require(key in tree, prefix + key, None, "missing")
    return cls(**{key: _convert(hints[key], tree[key], prefix + key) for key in hints})


def with_defaults(hint: Any, tree: Any, prefix: str = "") -> tuple[Any, Tree]:
    """The tree of a dataclass with the keys that it lacks, where they have a default.

    Args:
      hint: the dataclass, or the type hint of a part of it.
      tree: of a config that may be older than some of the keys.
      prefix: dotted key of the section, ending in a dot.

    Returns:
      The tree, and the values that were added by dotted key.
    """
    hint = _without_none(hint)
    if not isinstance(tree, dict):
        return tree, {}
    if dataclasses.is_dataclass(hint):
        hints = _hints(hint)
        missing = {key: value for key, value in _defaults(hint).items() if key not in tree}
    elif typing.get_origin(hint) is FrozenDict:
        hints = dict.fromkeys(tree, typing.get_args(hint)[1])
        missing = {}
    else:
        return tree, {}
    filled = {**tree, **missing}
    added = {prefix + key: value for key, value in missing.items()}
    for key in filter(hints.__contains__, tree):
        filled[key], inside = with_defaults(hints[key], tree[key], f"{prefix}{key}.")
        added |= inside
    return filled, added


def _convert(hint: Any, value: Any, key: str) -> Any:
    if type(value) is hint and hint in _SAID:  # most of them: what follows takes longer
        return _checked(value, key)
    if hint is Any:
        return _frozen(value)
    if isinstance(hint, types.UnionType):
        return _convert_union(typing.get_args(hint), value, key)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key + ".")
    if typing.get_origin(hint) is FrozenDict:
        require(isinstance(value, dict), key, value, "must be a section")
        return _convert_named(typing.get_args(hint)[1], value, key)
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, (list, tuple)), key, value, "must be a tuple")
        return tuple(_convert(typing.get_args(hint)[0], item, key) for item in value)
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    require(type(value) is hint, key, value, f"must be {_SAID.get(hint, hint.__name__)}")
    return _checked(value, key)


def _checked(value: Any, key: str) -> Any:
    """The value, if it is no number or one that the device can hold."""
    if type(value) in (int, float):
        number(key, value)
    return value


_SAID = {
    int: "a whole number (int)",
    float: "a number (float)",
    str: "a string (str)",
    bool: "True or False (bool)",
}


def _convert_union(hints: tuple[Any, ...], value: Any, key: str) -> Any:
    """Converts a value of `X | None`, or of one of several plain types."""
    others = [hint for hint in hints if hint is not types.NoneType]
    if value is None and len(others) < len(hints):
        return None
    if len(others) == 1:
        return _convert(others[0], value, key)
    names = ", ".join(hint.__name__ for hint in others)
    require(type(value) in others, key, value, f"must be one of the types {names}")
    return _checked(value, key)


def _convert_named(hint: Any, tree: Tree, key: str) -> FrozenDict:
    """Converts sections or values by name; values that are no sections go by dotted key."""
    if _goes_by_dotted_key(hint):
        tree = dict(flatten(tree))
    return FrozenDict(
        {
            name: _convert(hint, value, f"{key}.{name}")
            for name, value in tree.items()
            if value is not None
        }
    )


def _frozen(value: Any) -> Any:
    """Lists, which JSON has in place of tuples, as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return value


def put(cls: type, tree: Tree, key: str, value: Any) -> None:
    """Sets the value of a dotted key in a tree of `cls`.

    A section that is None, or a name that a `FrozenDict` does not have yet, begins with its
    defaults: `put(Config, tree, "model.moe.drop.policy", "probability")`.

    Raises:
      ValueError: for an unknown key, saying which one was probably meant.
    """
    *path, leaf = key.split(".")
    hint: Any = cls
    node = tree
    for depth, part in enumerate(path):
        hint = _inside(hint, part)
        if hint is None:
            _refuse_unknown(cls, tree, key, value)
        if hint is _DOTTED:
            node.setdefault(part, {})
        elif node.get(part) is None:
            node[part] = _defaults(hint)
        node = node[part]
        if not isinstance(node, dict):
            above = ".".join(path[: depth + 1])
            raise ValueError(f"{key}={value!r}: no such key; {above} is {node!r}, not a section")
    if _inside(hint, leaf) is None:
        _refuse_unknown(cls, tree, key, value)
    node[leaf] = to_tree(value) if dataclasses.is_dataclass(value) else value


_DOTTED = object()  # inside of a `FrozenDict` that goes by dotted key, any key is fine


def _inside(hint: Any, part: str) -> Any:
    """The type hint of a field or name of a section; None if there is no such field."""
    if hint is _DOTTED:
        return _DOTTED
    hint = _without_none(hint)
    if dataclasses.is_dataclass(hint):
        return _hints(hint).get(part)
    if typing.get_origin(hint) is FrozenDict:
        value = typing.get_args(hint)[1]
        return _DOTTED if _goes_by_dotted_key(value) else value
    return None


def _goes_by_dotted_key(hint: Any) -> bool:
    """Whether a `FrozenDict` of such values has dots in its names: they hold no sections."""
    return hint is Any or typing.get_origin(hint) is tuple


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        others = [h for h in typing.get_args(hint) if h is not types.NoneType]
        return others[0] if len(others) == 1 else hint
    return hint


def _defaults(hint: Any) -> Tree:
    """The tree of a section that was None: its defaults, as far as it has them."""
    hint = _without_none(hint)
    if not dataclasses.is_dataclass(hint):
        return {}
    found = {}
    for field in dataclasses.fields(hint):
        if field.default is not dataclasses.MISSING:
            found[field.name] = to_tree(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = to_tree(field.default_factory())
    return found


def _refuse_unknown(cls: type, tree: Tree, key: str, value: Any) -> typing.NoReturn:
    """Says which key was probably meant: a neighbour, or one of that name elsewhere."""
    known = sorted({*known_keys(cls), *dict(flatten(tree))})
    section, _, leaf = key.rpartition(".")
    neighbours = [k for k in known if k.startswith(f"{section}.")]
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    close = (
        difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)
        or _close_by_leaf(leaf, neighbours, cutoff=0.6)
        or _close_by_leaf(leaf, known, cutoff=0.75)
    )
    there = dict.fromkeys(k.removeprefix(f"{section}.").partition(".")[0] for k in neighbours)
    if close:
        hint = f"did you mean {close[0]}?"
    elif there:
        hint = f"{section} has {', '.join(there)}"
    else:
        hint = f"there is no section {section!r}"
    raise ValueError(f"{key}={value!r}: no such key; {hint}")


def _close_by_leaf(leaf: str, keys: list[str], cutoff: float) -> list[str]:
    """Keys whose last part is spelled alike."""
    by_leaf = {k.rpartition(".")[2]: k for k in keys}
    return [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1, cutoff)]


def known_keys(hint: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a dataclass, those of sections that are None by default included."""
    hint = _without_none(hint)
    if dataclasses.is_dataclass(hint):
        for name, inner in _hints(hint).items():
            yield from known_keys(inner, f"{prefix}.{name}" if prefix else name)
    elif typing.get_origin(hint) is not FrozenDict:
        yield prefix
