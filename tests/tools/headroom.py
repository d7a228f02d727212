"""Measures how much of their tolerances the tests' comparisons use: a pytest plugin.

    PYTEST_PLUGINS=tests.tools.headroom HEADROOM=used.jsonl python -m pytest

adds a JSON object for each comparison of a test to a file: the test, the tolerance, and the largest
error relative to it.  Where another processor rounds in another order the error may double, so that
a tolerance of which more than half is used holds by luck.  `processors` runs the tests so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Approx = type(pytest.approx(1.0))

_used: dict[tuple[str, str], float] = {}


def pytest_collection() -> None:
    """Begins to measure: after conftest has said what is rewritten, before tests import it."""
    from tests.tools import trees

    np.testing.assert_allclose = _measured_allclose(np.testing.assert_allclose)
    Approx.__eq__ = _measured_approx(Approx.__eq__)
    trees.assert_all_below = _measured_below(trees.assert_all_below)


def pytest_sessionfinish() -> None:
    """Adds what was measured to the file."""
    rows = [
        {"test": test, "tolerance": tolerance, "used": used}
        for (test, tolerance), used in _used.items()
    ]
    with open(os.environ["HEADROOM"], "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def share_used(found: Any, wanted: Any, rtol: float, atol: float) -> float:
    """The largest error of an array relative to what is allowed; of NaN and infinity 0."""
    x, y = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (found, wanted)))
    finite = np.isfinite(x) & np.isfinite(y)
    error = np.abs(x - y)[finite]
    allowed = (atol + rtol * np.abs(y))[finite]
    return float((error / np.maximum(allowed, 1e-300)).max(initial=0.0))


def _measured_allclose(compare: Callable[..., None]) -> Callable[..., None]:
    def assert_allclose(
        actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0, *args: Any, **options: Any
    ) -> None:
        __tracebackhide__ = True
        compare(actual, desired, rtol, atol, *args, **options)
        _note(f"rtol={rtol:g}, atol={atol:g}", share_used(actual, desired, rtol, atol))

    return assert_allclose


def _measured_approx(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def equals(self: Any, actual: Any) -> bool:
        same = compare(self, actual)
        if same and isinstance(actual, (int, float)):
            used = share_used(actual, self.expected, 0, self.tolerance)
            _note(f"approx, {self.tolerance:.1e}", used)
        return same

    return equals


def _measured_below(compare: Callable[..., None]) -> Callable[..., None]:
    def assert_all_below(errors: dict[Any, float], tolerance: float) -> None:
        __tracebackhide__ = True
        compare(errors, tolerance)
        _note(f"norms below {tolerance:g}", max(errors.values(), default=0.0) / tolerance)

    return assert_all_below


def _note(tolerance: str, used: float) -> None:
    """Keeps the largest share that a test uses of a tolerance."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    _used[test, tolerance] = max(_used.get((test, tolerance), 0.0), used)
