"""Rows of metrics: their arithmetic, and a file that survives kills."""

import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dsmoe_jax.config import Config, ModelConfig, replace
from dsmoe_jax.moe.dispatch import Exchange
from dsmoe_jax.moe.dropping import Ledger
from dsmoe_jax.moe.report import RouterStats
from dsmoe_jax.runs import metrics_log as m
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
    nothing = np.zeros((2, 2), np.float32)
    stats["ledger"] = Ledger(load, load, 0 * load, nothing, nothing, nothing)
    stats["device_rows_D"] = np.float32([[4, 1], [3, 2]])
    return RouterStats(**{**stats, "exchange": Exchange(load), **changes})


MODEL = ModelConfig(hidden_size=1000, compute_dtype="bfloat16")


def training_row(metrics, **moe):
    return m.training_row(metrics, replace(Config(model=MODEL), **moe).model)


def test_bits_per_byte():
    row = training_row(step_metrics())
    assert math.isclose(row["bits_per_byte"], 10 * 2.0 / math.log(2) / 25)


def test_what_is_missing_has_no_key():
    dense = training_row(step_metrics())
    assert not {"load", "maxvio", "router_entropy", "dead_experts"} & dense.keys()
    hashed = training_row(step_metrics(router=router_stats(sums={})))
    assert "router_entropy" not in hashed
    assert "load" in hashed


def test_load_by_layer():
    row = training_row(step_metrics(router=router_stats(), terms={"x": np.float32([1, 2])}))
    assert row["load"] == [[6, 2, 0, 0], [2, 2, 2, 2]]
    assert row["maxvio"] == [2.0, 0.0]  # (6 - 2) / 2
    differences = [abs(a - b) for a in (6, 2, 0, 0) for b in (6, 2, 0, 0)]
    np.testing.assert_allclose(row["gini"], [np.mean(differences) / (2 * 2), 0.0])
    assert row["dropped"] == [0, 0]
    assert not {"dropped_by_expert", "device_rows", "exchange_rows"} & row.keys()
    assert row["dead_experts"] == [2, 0]
    assert row["router_entropy"] == [0.5, 1.0]
    assert row["x"] == [1.0, 2.0]


def test_router_z_is_that_of_the_term_if_there_is_one():
    stats = router_stats(sums={"z": np.float32([5, 10])})
    assert training_row(step_metrics(router=stats))["router_z"] == [1.0, 2.0]
    term = step_metrics(router=stats, terms={"router_z": np.float32([3, 4])})
    assert training_row(term)["router_z"] == [3.0, 4.0]


def test_communication_volume():
    """A row of 1000 numbers of two bytes."""
    row = training_row(step_metrics(router=router_stats()), **{"model.moe.expert_groups": 3})
    assert row["device_rows"] == [[4, 1], [3, 2]]
    np.testing.assert_allclose(row["device_megabytes"], [[0.008, 0.002], [0.006, 0.004]])


def test_drops_are_checked():
    load = router_stats().load_E
    dropped = np.float32([[2, 0, 0, 0], [0, 0, 0, 0]])
    by = np.float32([[2, 0], [0, 0]])
    good = Ledger(load, load - dropped, dropped, by, by, by)
    row = training_row(
        step_metrics(router=router_stats(ledger=good)), **{"model.moe.drop.capacity_factor": 1.0}
    )
    assert row["dropped"] == [2, 0]
    assert row["dropped_by_expert"] == [[2, 0, 0, 0], [0, 0, 0, 0]]
    assert row["dropped_by_reason"] == row["dropped_by_device"] == [[2, 0], [0, 0]]
    for bad, says in (
        (good._replace(computed_E=load), "layer 0, expert 0: 6 assignments sent, 6 computed and 2"),
        (good._replace(dropped_E=0 * load), "4 computed and 0 dropped"),
        (good._replace(dropped_R=0 * by), "dropped by reason"),
    ):
        with pytest.raises(RuntimeError, match=says):
            training_row(step_metrics(router=router_stats(ledger=bad)))


def test_running_load_forgets_and_survives():
    """Against the sum over all steps with weights 0.99^age."""
    rng, running, sum_LE = np.random.default_rng(0), m.RunningLoad(), 0.0
    for step in range(300):
        load = rng.integers(1, 100, (2, 4)).astype(np.float32)
        running.add(step_metrics(router=router_stats(load_E=load)))
        sum_LE = sum_LE + 0.99 ** (299 - step) * load.astype(np.float64)
        if step == 200:
            running = m.RunningLoad(json.loads(json.dumps(running.saved())))
    want = sum_LE.max(axis=1) / sum_LE.mean(axis=1) - 1
    np.testing.assert_allclose(running.row()["maxvio_running"], want, rtol=1e-6)
    assert m.RunningLoad().row() == {}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"grad_norm": np.float32("inf")}, "grad_norm"),
        ({"loss": np.float32("nan"), "total_loss": np.float32("nan")}, "loss"),
        (
            {"total_loss": np.float32("nan"), "terms": {"router_z": np.float32([1, np.nan])}},
            "router_z",
        ),
        (
            {"router": router_stats(sums={"z": np.float32([np.inf, 1])}), "grad_norm": np.inf},
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


def events(directory):
    """What TensorBoard finds: (step, tag) -> number or histogram.

    A record is its length (8 bytes), a checksum (4), the data, a checksum (4).
    """
    (path,) = directory.glob("events.*")
    data, found = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            histogram = value.WhichOneof("value") == "histo"
            found[event.step, value.tag] = value.histo if histogram else value.simple_value
        data = data[16 + length :]
    return found


def test_tensorboard_gets_the_numbers_of_a_row(tmp_path):
    log = m.MetricsLog(tmp_path, 0)
    log.write({"step": 3, "loss": 2.5, "maxvio": [0.5, 0.0], "load": [[1, 3], [2, 2]]})
    log.close()
    found = events(tmp_path / "tensorboard")
    histograms = [found.pop((3, f"load/layer_{i}")) for i in range(2)]
    assert found == {(3, "loss"): 2.5, (3, "maxvio/layer_0"): 0.5, (3, "maxvio/layer_1"): 0.0}
    assert [(h.min, h.max, h.num) for h in histograms] == [(0.5, 1.5, 2), (1.0, 1.0, 2)]
    assert all(sum(h.bucket) == 2 for h in histograms)
