"""JSON of a run: written whole and by the standard, read with the file's name in every error.

JSON has no NaN and no infinity.  A number that is not finite is written as null, which every reader
takes, and read as NaN where it can mean nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe_jax.storage import files


def dumps(tree: Any, indent: int | None = None) -> str:
    """JSON text of nested dictionaries and lists, in ASCII."""
    return json.dumps(_map_leaves(_null_if_not_finite, tree), indent=indent, allow_nan=False)


def parse(text: bytes, place: str, *, null_is_nan: bool = False) -> dict[str, Any]:
    """The object of a JSON text.

    Raises:
      ValueError: beginning with `place`, if it is none.
    """
    try:
        tree = json.loads(text)
        if null_is_nan and b"null" in text:
            tree = _map_leaves(_nan_if_null, tree)
    except (ValueError, RecursionError) as error:  # also of wrong bytes and 5000 digits
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{place}: not a JSON object, but {type(tree).__name__}")
    return tree


def read(path: Path, *, null_is_nan: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: naming the file, if it holds none.
    """
    return parse(path.read_bytes(), str(path), null_is_nan=null_is_nan)


def write(path: Path, tree: Any) -> None:
    """Replaces a file as a whole: a reader sees the old content or the new one, never a part.

    Raises:
      OSError: naming the file, if it cannot be written (a full disk).
    """
    write_text(path, dumps(tree, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Like `write`, for any text, in UTF-8."""
    with files.replacing(path, sync=True) as file:
        file.write(text.encode("utf-8"))


def _nan_if_null(leaf: Any) -> Any:
    return math.nan if leaf is None else leaf


def _null_if_not_finite(leaf: Any) -> Any:
    return None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf


def _map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map_leaves(change, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_map_leaves(change, value) for value in tree]
    return change(tree)
