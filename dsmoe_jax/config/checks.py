"""Checks of config sections: errors that name the key, the value and what would be right."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

# Of a value in a message: a line, whatever a damaged file holds.
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200
_SHOWN.maxtuple = _SHOWN.maxlist = _SHOWN.maxdict = 20


def require(ok: bool, key: str, value: Any, want: str) -> None:
    """Raises a ValueError that names the key, its value and what would be right, unless `ok`."""
    if not ok:
        raise ValueError(f"{key}={_SHOWN.repr(value)}: {want}")


def checker(section: Any, prefix: str) -> Callable[[str, bool, str], None]:
    """`check(name, ok, want)` for the fields of one section."""

    def check(name: str, ok: bool, want: str) -> None:
        require(ok, prefix + name, getattr(section, name), want)

    return check


def positive(section: Any, prefix: str, *names: str) -> None:
    """Requires that the named fields of a section are > 0, or None where they may be."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, prefix + name, value, "must be > 0")


def not_negative(section: Any, prefix: str, *names: str) -> None:
    """Requires that the named fields of a section are >= 0, or None where they may be."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value >= 0, prefix + name, value, "must be >= 0")
