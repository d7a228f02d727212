"""The U-shape in granularity: its optimum, or the end of the sweep that is best."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_jax.study.u_shape import GRANULARITY_PER_SPLIT, fit_u_shape

SPLITS = np.array([1.0, 2.0, 4.0, 8.0, 16.0])


@given(optimum=st.floats(1.1, 15), bend=st.floats(0.001, 1), top=st.floats(-5, 5))
def test_a_synthetic_sweep_gives_its_optimum_back(optimum, bend, top):
    y_P = top - bend * np.log(SPLITS / optimum) ** 2
    shape = fit_u_shape(SPLITS, y_P)
    assert shape.optimum == pytest.approx(optimum, rel=1e-5)
    assert shape.best == shape.optimum
    np.testing.assert_allclose(shape.predict(SPLITS), y_P, atol=1e-9)


def test_the_curve_is_that_of_polyfit():
    y_P = np.random.default_rng(0).normal(size=5)
    shape = fit_u_shape(SPLITS, y_P)
    np.testing.assert_allclose(shape.coefficients[::-1], np.polyfit(np.log(SPLITS), y_P, 2))


@pytest.mark.parametrize(
    ("y_P", "best"),
    [
        (np.log(SPLITS), 16.0),  # better and better
        (-np.log(SPLITS), 1.0),
        (np.log(SPLITS / 3) ** 2, 16.0),  # bent the other way: worst inside
        (-(np.log(SPLITS / 100) ** 2), 16.0),  # the optimum is outside
    ],
)
def test_without_an_optimum_inside_the_better_end_is_best(y_P, best):
    shape = fit_u_shape(SPLITS, y_P)
    assert (shape.optimum, shape.best) == (None, best)


def test_too_few_granularities_and_losses_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"granularities=\[1.0, 2.0, 4.0\]: a U-shape needs four"):
        fit_u_shape([1, 2, 4], [1, 2, 3])
    with pytest.raises(ValueError, match=r"values=.*inf.*: must be finite"):
        fit_u_shape([1, 2, 4, 8], [1, 2, 3, np.inf])


def test_an_expert_of_a_quarter_ffn_has_granularity_three():
    """2 hidden size / expert width, with a standard FFN of 8/3 hidden size."""
    hidden_size = 48
    width = 8 * hidden_size / 3 / 4
    assert 2 * hidden_size / width == pytest.approx(4 * GRANULARITY_PER_SPLIT)
