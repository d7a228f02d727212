"""Changes of a config as text: `model.moe.n_shared_experts=2`."""

from __future__ import annotations

import ast
from typing import Any


def parse(text: str) -> tuple[str, Any]:
    """Splits `KEY=VALUE`; a value that is no Python literal is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text}: must be KEY=VALUE, such as train.steps=100")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
