"""Errors of trees: relative, by path, NaN included."""

import numpy as np
import pytest

from tests.tools.trees import assert_all_below, relative_errors


def test_errors_are_relative_and_by_path():
    wanted = {"a": np.array([3.0, 4.0]), "b": {"zero": np.zeros(2)}}
    found = {"a": np.array([3.0, 4.5]), "b": {"zero": np.array([0.0, 2.0])}}
    errors = relative_errors(found, wanted)
    assert errors == {"['a']": pytest.approx(0.1), "['b']['zero']": 2.0}


def test_another_structure_or_shape_is_refused():
    with pytest.raises(AssertionError):
        relative_errors({"a": np.ones(2)}, {"b": np.ones(2)})
    with pytest.raises(AssertionError, match="'a'"):
        relative_errors({"a": np.ones(1)}, {"a": np.ones(2)})


@pytest.mark.parametrize("bad", [0.2, np.nan])
def test_the_arrays_that_differ_are_named(bad):
    assert_all_below({"fine": 0.05}, 0.1)
    with pytest.raises(AssertionError, match="worse"):
        assert_all_below({"fine": 0.05, "worse": bad}, 0.1)
