"""The best setting of a sweep, on losses chosen by hand."""

import dataclasses

import pytest

from dsmoe_jax.report.blocks import Table, Text, plain
from dsmoe_jax.report.sweep_analyses import best_of_lines, turns_of_lines
from dsmoe_jax.study.results import Comparison, Row
from experiments.recipe import rates

SMALL = dataclasses.replace(
    rates.EXPERIMENT,
    arms=tuple(arm for arm in rates.EXPERIMENT.arms if arm.line in ("Dense", "GShard")),
    equal=(),
    claims=(),
)


def sweep(**losses) -> Comparison:
    """Losses by model, in the order of the rates; None is not finished."""
    rows = []
    for arm in SMALL.arms:
        place = rates.RATES.index(arm.x)
        if (loss := losses[arm.line][place]) is not None:
            values = {"validation_loss": loss, "tokens": 1}
            rows += [Row(arm.label, seed, "", "", values) for seed in (0, 1)]
    return Comparison(SMALL, "demo", SMALL.arms, tuple(rows), {}, "")


def shown(comparison: Comparison):
    blocks = best_of_lines(comparison, results=None)
    text = " ".join(plain(block.text) for block in blocks if isinstance(block, Text))
    (table,) = (block for block in blocks if isinstance(block, Table))
    return text, table.rows


def test_the_common_setting_has_the_lowest_mean_over_the_models():
    text, (dense, gshard) = shown(sweep(Dense=[4.0, 3.0, 3.5, 5.0], GShard=[3.1, 3.2, 2.8, 3.0]))
    assert "×0.707" in text.split("has the lowest mean")[0]
    assert "models: 3.100 nats per token" in text
    assert dense[0] == "Dense"
    assert "×0.707" in dense[1]
    assert dense[-1] == "–"
    assert "×1 " in gshard[1]
    assert gshard[2:] == ["2.800 ± 0.000", "3.200 ± 0.000", "0.400"]
    assert "At the edge" not in text


def test_the_value_at_the_scale_is_said():
    text, _ = shown(sweep(Dense=[4.0, 3.0, 3.5, 5.0], GShard=[3.1, 3.2, 2.8, 3.0]))
    rate = SMALL.arms[0].changed_values("demo")["optimizer.peak_learning_rate"]
    assert f"peak_learning_rate {2 * rate * 0.707:.2g}" in text


def test_a_best_setting_at_the_edge_is_said():
    text, _ = shown(sweep(Dense=[2.9, 3.0, 3.5, 5.0], GShard=[3.1, 3.2, 2.8, 3.0]))
    assert "At the edge of the sweep, so perhaps better beyond it: Dense." in text


@pytest.mark.parametrize("gshard", [[None] * 4, [3.1, None, None, None]])
def test_a_setting_that_one_model_lacks_is_not_the_common_one(gshard):
    assert best_of_lines(sweep(Dense=[4.0, 3.0, 3.5, 5.0], GShard=gshard), results=None) == []
    text, _ = shown(sweep(Dense=[4.0, 3.0, 3.5, 5.0], GShard=[3.1, None, 2.8, 3.0]))
    assert "×1 " in text.split("has the lowest mean")[0]


def test_pairs_whose_order_turns():
    """Dense is ahead by 0.5 at first and behind by 0.25 at last; it is level nowhere."""
    found = turns_of_lines(sweep(Dense=[3.0, 3.1, 3.2, 3.25], GShard=[3.5, 3.4, 3.1, 3.0]), None)
    (text,) = (plain(block.text) for block in found if isinstance(block, Text))
    assert text.startswith("1 of the 1 pairs of models are in another order at ×1.41")
    assert "means over 2 seeds or more" in text
    (table,) = (block for block in found if isinstance(block, Table))
    assert table.rows == [["Dense", "GShard", "0.500", "0.250", "×0.707 and ×1"]]


def test_pairs_whose_order_stays():
    found = turns_of_lines(sweep(Dense=[3.0, 3.1, 3.2, 3.3], GShard=[2.9, 3.2, 3.1, 3.0]), None)
    assert "0 of the 1 pairs" in " ".join(plain(b.text) for b in found if isinstance(b, Text))
    assert not any(isinstance(block, Table) for block in found)


def test_the_order_at_one_setting_turns_nowhere():
    unfinished = [3.0, None, None, None]
    assert turns_of_lines(sweep(Dense=unfinished, GShard=unfinished), None) == []
