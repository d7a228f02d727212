"""Prices from a table of the user's: there are none in the code.

currency = "EUR"

[chip_hour]        # an hour of one chip, by the names of hardware/chips.py
h100 = 2.0

[memory]           # optional
gb_hour = 0.01     # of a GB of a chip's memory
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsmoe_jax.config.paths import local_path
from dsmoe_jax.hardware.chips import CHIPS

_SECTIONS = {"chip_hour": tuple(CHIPS), "memory": ("gb_hour",)}


class Prices(NamedTuple):
    """A table of prices.

    Attributes:
      currency: their name.
      chip_hour: of an hour of one chip, by chip.
      gb_hour: of a GB of memory for an hour; None if the table has none.
    """

    currency: str
    chip_hour: Mapping[str, float]
    gb_hour: float | None


def read(path: str, chip: str, flag: str = "--prices") -> Prices:
    """Reads a table of prices, in TOML.

    Args:
      path: of the file.
      chip: that must have a price.
      flag: that names it, for errors.

    Raises:
      ValueError: if there is no such file, or it is no such table.
    """
    key = f"{flag}={path}"
    place = local_path(flag, path)
    if not place.is_file():
        raise ValueError(f"{key}: no such file")
    tree = _parse(place, key)
    for name in tree.keys() - {"currency", *_SECTIONS}:
        raise ValueError(f"{key}: {name}: no such key; known: currency, {', '.join(_SECTIONS)}")
    currency = tree.get("currency")
    if not isinstance(currency, str) or not currency:
        raise ValueError(f"{key}: currency={currency!r}: must be a name")
    chip_hour, memory = (_section(tree, name, key) for name in _SECTIONS)
    if chip not in chip_hour:
        raise ValueError(f"{key}: chip_hour.{chip}: missing; the price of an hour of --chip={chip}")
    return Prices(currency, chip_hour, memory.get("gb_hour"))


def _parse(place: Path, key: str) -> dict[str, Any]:
    try:
        return tomllib.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:  # also of wrong bytes
        raise ValueError(f"{key}: not TOML ({error})") from error


def _section(tree: Mapping[str, Any], name: str, key: str) -> dict[str, float]:
    """A section of prices, all of them known and positive."""
    section = tree.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{key}: {name}={section!r}: must be a section [{name}]")
    for item, price in section.items():
        if item not in _SECTIONS[name]:
            known = ", ".join(_SECTIONS[name])
            raise ValueError(f"{key}: {name}.{item}: no such key; known: {known}")
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not number or not 0 < price < math.inf:
            raise ValueError(f"{key}: {name}.{item}={price!r}: must be a number above 0")
    return {item: float(price) for item, price in section.items()}
