"""The picture in panels: lines of made-up losses, with the best of each ringed."""

import dataclasses

import numpy as np
import pytest

from dsmoe_jax.report import plots
from dsmoe_jax.report.style import ARM_COLOURS
from dsmoe_jax.study.results import Comparison, Row
from experiments.laws.widths import EXPERIMENT
from experiments.v1 import table1

# By width and parametrisation, the rate with the lowest loss; losses rise with its distance.
BEST = {
    "width 0.5, standard": 4.0,
    "width 0.5, muP": 1.0,
    "width 1, both": 1.0,
    "width 2, standard": 0.25,
    "width 2, muP": 1.0,
}

COLOURS = dict(zip(("width 0.5", "width 1", "width 2"), ARM_COLOURS, strict=False))


def row(arm, seed):
    loss = 4 + abs(np.log2(arm.x / BEST[arm.line])) + 0.1 * seed
    measures = {"validation_loss": loss, "tokens": 1.0}
    return Row(arm.label, seed, "dsmoe_2b_widths", "", measures)


def made_up(experiment, arms):
    rows = tuple(row(arm, seed) for arm in arms for seed in (0, 1))
    return Comparison(experiment, "smoke", experiment.arms, rows, {}, "")


def test_a_panel_for_each_parametrisation_with_the_base_in_both():
    figure = plots.draw(made_up(EXPERIMENT, EXPERIMENT.arms))["panels_over_x"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["standard", "muP"]
    low, high = figure.axes[0].get_ylim()
    assert low < 4 < 8.1 < high
    for ax in figure.axes:
        kind = ax.get_title(loc="left")
        names = [f"width 0.5, {kind}", "width 1, both", f"width 2, {kind}"]
        assert {t.get_text() for t in ax.texts} == {"width 0.5", "width 1, both", "width 2"}
        rings = [c.get_offsets()[0] for c in ax.collections if not len(c.get_facecolors())]
        np.testing.assert_allclose(rings, [(BEST[name], 4.05) for name in names])
        for line, name in zip(ax.lines, names, strict=True):
            x, y = line.get_data()
            assert line.get_color() == COLOURS[name.partition(",")[0]]
            np.testing.assert_allclose(x, [0.25, 0.5, 1, 2, 4])
            np.testing.assert_allclose(y, 4.05 + abs(np.log2(x / BEST[name])))


def test_without_a_finished_run_there_is_no_panel():
    muP_only = [arm for arm in EXPERIMENT.arms if arm.line == "width 2, muP"]
    (ax,) = plots.draw(made_up(EXPERIMENT, muP_only))["panels_over_x"].axes
    assert ax.get_title(loc="left") == "muP"
    assert len(ax.lines) == 1
    assert "panels_over_x" not in plots.draw(made_up(EXPERIMENT, []))


def test_lines_that_no_arm_has_are_refused():
    with pytest.raises(ValueError, match=r"table1: panels\['a'\]=\('width 3',\): must be lines"):
        dataclasses.replace(table1.EXPERIMENT, panels={"a": ("width 3",)})
