"""Comparing trees of arrays; for entry by entry there is `chex.assert_trees_all_close`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

# Relative difference of what is computed in float32 in another order: parts of a batch, devices.
# From a weight to the loss and back are some hundred operations, each with a rounding of 2**-24, so
# that even roundings that all add up stay below 1e-5 (1e-6 is the most seen).  A term, row or scale
# that is missing moves a gradient by over 1e-3.
REORDERED = 1e-5


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the path to them."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def relative_errors(found: Any, wanted: Any) -> dict[str, float]:
    """The error of each array by its path, ||found - wanted|| / ||wanted||; of zeros the norm.

    For sums that were added up in another order: single entries of them may be mostly rounding.
    """
    found, wanted = by_path(found), by_path(wanted)
    assert sorted(found) == sorted(wanted)
    errors = {}
    for path, y in wanted.items():
        x, y = (np.asarray(jax.device_get(a), np.float64) for a in (found[path], y))
        assert x.shape == y.shape, path
        errors[path] = float(np.linalg.norm(x - y) / (np.linalg.norm(y) or 1.0))
    return errors


def assert_all_below(errors: dict[Any, float], tolerance: float) -> None:
    """Fails with all errors that are not below the tolerance, NaN included."""
    wrong = {key: error for key, error in errors.items() if not error < tolerance}
    assert not wrong
