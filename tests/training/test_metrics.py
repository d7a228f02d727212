"""Rows of metrics: their arithmetic, and a file that survives kills."""

import json
import math

import numpy as np
import pytest

from dsmoe_jax.moe.layer import RouterStats
from dsmoe_jax.training import metrics as m
from dsmoe_jax.training.step import StepMetrics


def step_metrics(**changes):
    """Of a step with 10 tokens that stand for 25 bytes, without routed experts."""
    numbers = dict(
        loss=2.0, total_loss=2.0, tokens=10.0, bytes=25.0, grad_norm=0.5, learning_rate=1e-3
    )
    arrays = {key: np.float32(value) for key, value in numbers.items()}
    return StepMetrics(**{**arrays, "terms": {}, "router": None, **changes})


def router_stats(**changes):
    load = np.array([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    tokens, sums = np.float32([5, 5]), {"entropy": np.float32([2.5, 5])}
    stats = {"tokens": tokens, "load_E": load, "sums": sums, "terms": {}}
    return RouterStats(**{**stats, **changes})


def test_bits_per_byte():
    row = m.training_row(step_metrics())
    assert math.isclose(row["bits_per_byte"], 10 * 2.0 / math.log(2) / 25)


def test_what_is_missing_has_no_key():
    dense = m.training_row(step_metrics())
    assert not {"load", "maxvio", "router_entropy", "dead_experts"} & dense.keys()
    hashed = m.training_row(step_metrics(router=router_stats(sums={})))
    assert "router_entropy" not in hashed
    assert "load" in hashed


def test_load_by_layer():
    row = m.training_row(step_metrics(router=router_stats(), terms={"x": np.float32([1, 2])}))
    assert row["load"] == [[6, 2, 0, 0], [2, 2, 2, 2]]
    assert row["maxvio"] == [2.0, 0.0]  # (6 - 2) / 2
    assert row["dead_experts"] == [2, 0]
    assert row["router_entropy"] == [0.5, 1.0]
    assert row["x"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"grad_norm": np.float32("inf")}, "grad_norm"),
        ({"loss": np.float32("nan"), "total_loss": np.float32("nan")}, "loss"),
        (
            {"total_loss": np.float32("nan"), "terms": {"router_z": np.float32([1, np.nan])}},
            "router_z",
        ),
    ],
)
def test_the_first_metric_that_is_not_finite(changes, name):
    found = m.first_non_finite(step_metrics(**changes))
    assert found is not None
    assert found[0] == name
    assert not math.isfinite(found[1])
    assert m.first_non_finite(step_metrics(router=router_stats())) is None


class TestLog:
    def write(self, workdir, *steps, start=0):
        log = m.MetricsLog(workdir, start)
        for step in steps:
            log.write({"step": step, "loss": 1 / step})
        log.close()

    def test_rows_past_the_checkpoint_are_cut(self, tmp_path):
        self.write(tmp_path, 1, 2, 3, 4)
        self.write(tmp_path, 3, 4, 5, start=2)
        assert [row["step"] for row in m.read_rows(tmp_path)] == [1, 2, 3, 4, 5]
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5

    def test_a_half_written_last_line_is_no_row(self, tmp_path):
        self.write(tmp_path, 1, 2)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 3, "lo')
        assert [row["step"] for row in m.read_rows(tmp_path)] == [1, 2]
        self.write(tmp_path, 3, start=2)
        assert [row["step"] for row in m.read_rows(tmp_path)] == [1, 2, 3]

    def test_a_broken_line_elsewhere_is_an_error(self, tmp_path):
        self.write(tmp_path, 1, 2)
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1\n' + path.read_text())
        before = path.read_text()
        with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 is not a row"):
            m.MetricsLog(tmp_path, 2)
        assert path.read_text() == before

    def test_validation_joins_its_step(self, tmp_path):
        self.write(tmp_path, 1)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 1, "validation_loss": 3.0}) + "\n")
        assert m.read_rows(tmp_path) == [{"step": 1, "loss": 1.0, "validation_loss": 3.0}]
