"""Measures: one entry in the registry is a key of results.jsonl and a column of the table."""

import dataclasses
import json
import pathlib

import pytest

from dsmoe_jax.report import tables
from dsmoe_jax.study import measures, results
from dsmoe_jax.study.claims import bounded
from dsmoe_jax.study.measures import RESULTS, Measure
from dsmoe_jax.study.readings import Outcome
from dsmoe_jax.study.verdicts import judge
from experiments.v1.table1 import EXPERIMENT

ROOT = pathlib.Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "experiments/results").glob("*/results.jsonl"))


def test_a_new_measure_is_an_entry_in_the_registry(fake_run, tmp_path, monkeypatch):
    """It is in results.jsonl, in the table, and may be claimed about; nothing else changes."""

    def steps(outcome):
        return outcome.rows[-1]["step"] if outcome.rows else None

    toy = Measure("steps made", steps, columns={RESULTS: "steps"}, digits=1)
    monkeypatch.setitem(measures.MEASURES, "toy", toy)
    claims = (bounded("Dense", above=5, measure="toy"),)
    experiment = dataclasses.replace(EXPERIMENT, claims=claims)
    comparison = fake_run(experiment=experiment, report=True)
    lines = (tmp_path / "runs/table1-smoke/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["toy"] for line in lines] == [8] * 5
    table = tables.results_table(comparison)
    assert [row[table.head.index("steps")] for row in table.rows] == ["8.0"] * 5
    finding = judge(comparison)[-1]
    assert (finding.ours, finding.verdict) == (3.0, "holds")
    report = (tmp_path / "runs/table1-smoke/report.md").read_text()
    assert "| steps made: Dense above 5 | holds | +3.0 | – | – |" in report


def test_a_measure_that_is_best_when_high_ranks_the_other_way_round(fake_run, monkeypatch):
    toy = Measure(
        "score", lambda outcome: outcome.config.model.moe.n_routed_experts, lower_is_better=False
    )
    monkeypatch.setitem(measures.MEASURES, "toy", toy)
    experiment = dataclasses.replace(EXPERIMENT, measures=("toy", "maxvio"))
    comparison = fake_run(experiment=experiment, arms=("dense", "gshard", "deepseekmoe"))
    assert next(iter(tables.ranking(comparison, "toy"))) == "DeepSeekMoE"
    table = tables.results_table(comparison)
    assert (table.head, table.best) == (["", "score", "MaxVio", "seeds"], 2)


@pytest.mark.parametrize("path", COMMITTED, ids=[path.parent.name for path in COMMITTED])
def test_committed_results_are_read(path, tmp_path):
    rows = results.load_rows(path)
    assert all(row.finished for row in rows)
    lowest = 0.5 if "fine_tuning" in path.parent.name else 3  # that of answers alone
    assert all(row["validation_loss"] > lowest for row in rows)
    assert {row["maxvio"] is None for row in rows if row.arm == "Dense"} <= {True}
    results.write_rows(tmp_path / "results.jsonl", rows)
    again = (tmp_path / "results.jsonl").read_text().splitlines()
    assert list(map(json.loads, again)) == list(map(json.loads, path.read_text().splitlines()))


def test_traffic_is_that_of_all_layers_and_devices_at_the_end():
    config = EXPERIMENT.arm("GShard").run_config("smoke", 0)
    rows = [{"device_megabytes": [[n, n], [n, 2 * n]]} for n in range(1, 11)]
    read = measures.MEASURES["device_megabytes"].read
    assert read(Outcome(config, config, rows)) == pytest.approx(5 * (9 + 10) / 2)
    assert read(Outcome(config, config, [{"loss": 1.0}])) is None  # one device


def test_evenness_of_traffic_is_that_of_the_rows_that_devices_receive():
    config = EXPERIMENT.arm("GShard").run_config("smoke", 0)
    # Layers of MaxVio 0 and n / 4; the last fifth are the steps 9 and 10.
    uneven = [[4 - n / 4, 4 + n, 4, 4 - 3 * n / 4] for n in range(11)]
    rows = [{"device_rows": [[4, 4, 4, 4], rows_D]} for rows_D in uneven]
    read = measures.MEASURES["traffic_maxvio"].read
    assert read(Outcome(config, config, rows)) == pytest.approx((9 / 8 + 10 / 8) / 2)
    assert read(Outcome(config, config, [{"loss": 1.0}])) is None  # one device


def test_generalisation_gap_is_held_out_loss_above_that_of_training():
    config = EXPERIMENT.arm("GShard").run_config("smoke", 0)
    rows = [{"loss": float(10 - n)} for n in range(10)]  # the last fifth: 2 and 1
    read = measures.MEASURES["generalisation_gap"].read
    assert read(Outcome(config, config, rows, {"loss": 2.0})) == pytest.approx(0.5)
    assert read(Outcome(config, config, rows)) is None  # not finished


def test_a_measure_newer_than_a_row_is_missing_there():
    row = results.Row("A", 0, "", "", {"validation_loss": 3.0})
    assert row["validation_loss"] == 3.0
    assert row["maxvio"] is None


def test_unknown_measures_are_refused_when_an_experiment_is_built():
    with pytest.raises(ValueError, match=r"table1: measure 'los': must be one of validation_loss,"):
        dataclasses.replace(EXPERIMENT, measures=("los",))
