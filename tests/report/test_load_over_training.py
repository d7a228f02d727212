"""The picture of load over training: what is drawn is what was logged."""

import numpy as np
import pytest

from dsmoe_jax.report.load_over_training import draw
from dsmoe_jax.study.histories import loads_of


def rows(n_steps=5, n_layers=2, n_experts=4):
    load = np.random.default_rng(0).integers(1, 50, (n_steps, n_layers, n_experts))
    return [{"step": i, "tokens": 10 * i, "load": load[i].tolist()} for i in range(n_steps)]


def test_panels_show_the_rows():
    one, two = rows(), rows(48, 1, 6)
    figure = draw({"one": loads_of(one), "two": loads_of(two)})
    panels = np.array(figure.axes[:6]).reshape(3, 2)  # two layers and MaxVio, for two runs
    load_SE = np.array([row["load"][1] for row in one])
    (mesh,) = panels[1, 0].collections
    want = (load_SE / load_SE.mean(axis=1, keepdims=True)).T
    np.testing.assert_allclose(mesh.get_array().reshape(want.shape), want)
    line = panels[2, 0].lines[1]
    np.testing.assert_allclose(line.get_xdata(), [10 * i for i in range(5)])
    np.testing.assert_allclose(line.get_ydata(), load_SE.max(axis=1) / load_SE.mean(axis=1) - 1)
    assert not panels[1, 1].axison, "the second run has one layer"
    assert len(panels[2, 1].lines) == 1
    load_SE = np.array([row["load"][0] for row in two])
    shares_SE = load_SE / load_SE.mean(axis=1, keepdims=True)
    pairs = panels[0, 1].collections[0].get_array().reshape(6, 24)
    np.testing.assert_allclose(pairs, (shares_SE[::2] + shares_SE[1::2]).T / 2)


@pytest.mark.parametrize("empty", [[], [{"step": 1, "tokens": 10, "loss": 1.0}]])
def test_without_experts_there_is_nothing(empty):
    assert loads_of(empty) is None
