"""Names that somebody else chose, of arms, domains and files, as a report shows them.

A name is shown literally: nothing in it is understood as markup, mathematics or a line break.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_MARKUP = re.compile(r"[\\`*]")
# Line breaks and other control characters, halves of characters, and what turns the direction of
# the text around it.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def one_line(name: str) -> str:
    """A name in one line, for a cell of a table; what cannot be shown there is U+FFFD."""
    return _UNSHOWN.sub("\ufffd", re.sub(r"\s+", " ", name))


def literal(name: str) -> str:
    """A name as part of running text, see `blocks.spans`."""
    return _MARKUP.sub(r"\\\g<0>", one_line(name))


def short(name: str, length: int = 24) -> str:
    """A name for a picture, which has no room for a long one."""
    line = one_line(name)
    return line if len(line) <= length else line[: length - 1] + "…"


def telling_apart(paths: Sequence[str | Path]) -> list[str]:
    """The shortest ends of paths that all differ, their parts joined by a dash.

    Raises:
      ValueError: if a path is there twice.
    """
    whole = [Path(path).absolute() for path in paths]
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["-".join(path.parts[-depth:]).strip("/") for path in whole]
        if len(set(names)) == len(names):
            return names
    twice = next(path for i, path in enumerate(whole) if path in whole[:i])
    raise ValueError(f"{twice}: is given twice; give each run once")
