"""Checks of config sections: errors that name the key, the value and what would be right.

Ranges of numbers: `number` has what holds for every number of a config, wherever it stands, and a
section's `__post_init__` has what its own fields must be besides.
"""

from __future__ import annotations

import itertools
import math
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


_BITS = 32  # of a whole number; jax.random.key would cut a longer seed without a word
_FLOAT32 = (2.0**-126, 2.0**128 - 2.0**104)  # smallest and largest; below is 0 on the device


def number(key: str, value: float) -> None:
    """Requires a number that the device can hold.

    Raises:
      ValueError: for NaN, an infinity, or what is too large or too small for 32 bits.
    """
    if isinstance(value, int):
        require(abs(value) < 2**_BITS, key, value, f"must be a whole number of {_BITS} bits")
        return
    smallest, largest = _FLOAT32
    fits = math.isfinite(value) and (value == 0 or smallest <= abs(value) <= largest)
    require(fits, key, value, f"must be finite and 0 or from {smallest:.2g} to {largest:.2g}")


def is_by_step(pairs: tuple[tuple[float, ...], ...], last: float = math.inf) -> bool:
    """Whether these are pairs (step, something) with whole growing steps from 1 to `last`."""
    if any(len(pair) != 2 for pair in pairs):
        return False
    steps = [pair[0] for pair in pairs]
    whole = all(1 <= step <= last and step == int(step) for step in steps)
    return whole and all(a < b for a, b in itertools.pairwise(steps))


def positive(section: Any, prefix: str, *names: str) -> None:
    """Requires that the named fields of a section are > 0, or None where they may be."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, prefix + name, value, "must be > 0")
        number(prefix + name, value or 0)


def not_negative(section: Any, prefix: str, *names: str) -> None:
    """Requires that the named fields of a section are >= 0, or None where they may be."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value >= 0, prefix + name, value, "must be >= 0")
        number(prefix + name, value or 0)
