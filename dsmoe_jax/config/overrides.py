"""Changes of a config as text: `model.moe.n_shared_experts=2`."""

from __future__ import annotations

import ast
from typing import Any

_WORDS = {"true": True, "false": False}


def parse(text: str) -> tuple[str, Any]:
    """Splits `KEY=VALUE`: `parse("train.steps=100")` is `("train.steps", 100)`.

    A value is a Python literal: a number, None, True or False (also true and false), a tuple
    `(0.5,0.75)`, a tuple of tuples (a schedule), a string in quotes.  Anything else is a string as
    it stands; a string that would be a literal needs quotes of its own: `data.corpus="'2026'"`.

    Raises:
      ValueError: if there is no key or no `=`.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text}: must be KEY=VALUE, such as train.steps=100")
    return key, _value(value)


def write(key: str, value: Any) -> str:
    """`KEY=VALUE` from which `parse` gets the same key and value: `("a.b", 3)` is "a.b=3"."""
    as_it_stands = f"{key}={value}"
    return as_it_stands if parse(as_it_stands) == (key, value) else f"{key}={value!r}"


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
