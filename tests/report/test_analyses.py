"""The analyses of a report: what they show, and what they say where runs are missing."""

import dataclasses

import numpy as np
import pytest
from made_up_runs import FakeTrain, run_made_up

from dsmoe_jax.report import analyses, blocks
from dsmoe_jax.report.granularity_analyses import equal_time
from dsmoe_jax.report.html_page import to_html
from dsmoe_jax.study import baselines, laws, resampling
from experiments.laws import granularity, granularity_time, sizes
from experiments.v1 import fig6

SPLITS = granularity.SPLITS


@pytest.fixture(autouse=True)
def no_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(resampling, "RESAMPLES", 40)


@pytest.fixture
def losses(monkeypatch):
    """Losses by config name, with an optimum in granularity at m = 6."""
    found = {
        granularity.split(m).run_config("smoke", 0).name: 4.5 + 0.05 * np.log(m / 6) ** 2
        for m in SPLITS
    }
    names = [arm.run_config("smoke", 0).name for arm in sizes.GSHARD.arms]
    found |= dict(zip(names, (4.9, 4.7, 4.6, 4.4), strict=True))
    monkeypatch.setattr("made_up_runs.FINAL_LOSS", found)


def text_of(found):
    """All words of blocks."""
    return to_html("", found)


def tables_of(found):
    return [block for block in found if isinstance(block, blocks.Table)]


def test_the_law_and_the_u_shape_of_a_sweep(losses, tmp_path):
    comparison = run_made_up(
        tmp_path, FakeTrain(noise=0.003), granularity.EXPERIMENT, seeds=3, report=True
    )
    found = analyses.analyse(comparison, tmp_path)
    constants, optima = tables_of(found)[:2]
    assert constants.head[0] == laws.FORMS["one N and D"].text
    assert [row[0] for row in constants.rows] == ["c", "g", "gamma"]
    name, optimum, best, said = optima.rows[0]
    assert name == "the loss"
    assert float(optimum) == pytest.approx(6, rel=0.3)
    low, high = map(float, best.split(" to "))
    assert low < float(optimum) < high
    assert said == "an optimum inside the sweep"
    assert "The leverage is not fitted: There are no results of GShard" in text_of(found)
    markdown = (tmp_path / "granularity-smoke/report.md").read_text()
    for name in ("granularity_law", "granularity_u_shape"):
        assert f"(pictures/{name}.svg)" in markdown
        assert (tmp_path / f"granularity-smoke/pictures/{name}.svg").exists()


def test_with_a_baseline_there_is_leverage_and_effective_compute(losses, tmp_path):
    run_made_up(tmp_path, FakeTrain(noise=0.003), sizes.EXPERIMENT, seeds=2)
    comparison = run_made_up(tmp_path, FakeTrain(noise=0.003), granularity.EXPERIMENT, seeds=2)
    found = analyses.analyse(comparison, tmp_path)
    optima = tables_of(found)[1]
    assert [row[0] for row in optima.rows][1:] == ["the logarithm of the leverage over GShard"]
    counted = next(table for table in tables_of(found) if "GShard needs" in table.head)
    assert [row[0] for row in counted.rows] == list(granularity.LABELS)
    assert [row[2] for row in counted.rows] == ["×1"] * 6
    assert all(row[3].startswith("×") for row in counted.rows[:5])
    assert "*" in counted.rows[2][3] or float(counted.rows[2][3][1:]) > 1


def test_one_seed_has_no_interval_and_says_so(losses, tmp_path):
    comparison = run_made_up(tmp_path, FakeTrain(), granularity.EXPERIMENT, seeds=1)
    found = analyses.analyse(comparison, tmp_path)
    constants, optima = tables_of(found)[:2]
    assert {row[2] for row in (*constants.rows, *optima.rows)} == {"–"}
    assert text_of(found).count("One seed: there is no interval") == 2


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (("m_1", "m_2"), "Not fitted: granularities=[1.0, 2.0]: the law needs three"),
        (("m_1", "m_2", "m_4"), "Not fitted: granularities=[1.0, 2.0, 4.0]: a U-shape needs four"),
        (("deepseekmoe",), "No seed is finished in all arms yet."),
    ],
)
def test_missing_arms_are_said(tmp_path, arms, said):
    comparison = run_made_up(tmp_path, FakeTrain(), granularity.EXPERIMENT, arms=arms, report=True)
    assert said in text_of(analyses.analyse(comparison, tmp_path))


def test_before_the_first_run_every_experiment_has_a_report(tmp_path):
    for experiment in (sizes.EXPERIMENT, granularity_time.EXPERIMENT, fig6.EXPERIMENT):
        run_made_up(tmp_path, FakeTrain(), experiment, report_only=True, report=True)


def test_every_line_has_a_law_of_compute(losses, tmp_path):
    comparison = run_made_up(tmp_path, FakeTrain(noise=0), sizes.EXPERIMENT, report=True)
    found = analyses.analyse(comparison, tmp_path)
    assert len(tables_of(found)) == 2
    assert "<strong>GShard</strong>" in text_of(found)
    markdown = (tmp_path / "sizes-smoke/report.md").read_text()
    assert "2 to 18 steps of 4 sequences" in markdown
    assert "the same batch and seeds" in markdown


def test_unequal_times_are_said(tmp_path):
    """The made-up runs make as many tokens a second, so that more steps take more time."""
    equal = tuple(granularity.split(m) for m in SPLITS)
    longer = (*equal[:-1], granularity.split(16, ",steps_percent=150"))
    for arms, said in ((equal, "by at most 0.0 %"), (longer, "The times are not equal**: they")):
        experiment = dataclasses.replace(granularity_time.EXPERIMENT, arms=arms)
        comparison = run_made_up(tmp_path / said[:5], FakeTrain(), experiment)
        verdict = equal_time(comparison, tmp_path)[1]
        assert said in verdict.text
    assert "by up to 50 %" in verdict.text


def test_every_analysis_that_an_experiment_names_is_there():
    with pytest.raises(ValueError, match=r"analysis 'law': must be one of granularity_law, gran"):
        analyses.analysis("law")
