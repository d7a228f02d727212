"""Rows of metrics.jsonl: their arithmetic."""

import json
import math

import numpy as np
import pytest

from dsmoe_jax.config import Config, ModelConfig, replace
from dsmoe_jax.moe.dispatch import DispatchReport
from dsmoe_jax.moe.dropping import Ledger
from dsmoe_jax.moe.report import LoggedSums
from dsmoe_jax.training import rows
from dsmoe_jax.training.step import StepMetrics


def step_metrics(**changes):
    """Metrics of a step with 10 tokens that stand for 25 bytes, without routed experts."""
    numbers = dict(
        loss=2.0, total_loss=2.0, tokens=10.0, bytes=25.0, grad_norm=0.5, learning_rate=1e-3
    )
    arrays = {key: np.float32(value) for key, value in numbers.items()}
    nothing = {"parts": {}, "terms": {}, "router": None, "recorded": None}
    return StepMetrics(**{**arrays, **nothing, **changes})


def logged_sums(**changes):
    load = np.array([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    tokens, sums = np.float32([5, 5]), {"entropy": np.float32([2.5, 5])}
    stats = {"tokens": tokens, "load_E": load, "token_sums": sums}
    nothing = np.zeros((2, 2), np.float32)
    stats["ledger"] = Ledger(load, load, 0 * load, nothing, nothing, nothing)
    stats["device_rows_D"] = np.float32([[4, 1], [3, 2]])
    return LoggedSums(**{**stats, "dispatch": DispatchReport(load), **changes})


MODEL = ModelConfig(hidden_size=1000, compute_dtype="bfloat16")


def training_row(metrics, **moe):
    return rows.training_row(metrics, replace(Config(model=MODEL), **moe).model)


def test_bits_per_byte():
    row = training_row(step_metrics())
    assert math.isclose(row["bits_per_byte"], 10 * 2.0 / math.log(2) / 25)


def test_what_is_missing_has_no_key():
    assert "bits_per_byte" not in training_row(step_metrics(bytes=np.float32(0)))
    dense = training_row(step_metrics())
    assert not {"load", "maxvio", "router_entropy", "dead_experts"} & dense.keys()
    hashed = training_row(step_metrics(router=logged_sums(token_sums={})))
    assert "router_entropy" not in hashed
    assert "load" in hashed


def test_load_by_layer():
    row = training_row(step_metrics(router=logged_sums(), terms={"switch": np.float32([1, 2])}))
    assert row["load"] == [[6, 2, 0, 0], [2, 2, 2, 2]]
    assert row["maxvio"] == [2.0, 0.0]  # (6 - 2) / 2
    differences = [abs(a - b) for a in (6, 2, 0, 0) for b in (6, 2, 0, 0)]
    np.testing.assert_allclose(row["gini"], [np.mean(differences) / (2 * 2), 0.0])
    assert row["dropped"] == [0, 0]
    assert not {"dropped_by_expert", "device_rows", "exchange_rows"} & row.keys()
    assert row["dead_experts"] == [2, 0]
    assert row["router_entropy"] == [0.5, 1.0]
    assert row["switch_balance"] == [1.0, 2.0]


def test_router_z_is_that_of_the_term_if_there_is_one():
    stats = logged_sums(token_sums={"z": np.float32([5, 10])})
    assert training_row(step_metrics(router=stats))["router_z"] == [1.0, 2.0]
    term = step_metrics(router=stats, terms={"router_z": np.float32([3, 4])})
    assert training_row(term)["router_z"] == [3.0, 4.0]


def test_communication_volume():
    """A row of 1000 numbers of two bytes."""
    row = training_row(step_metrics(router=logged_sums()), **{"model.moe.expert_groups": 3})
    assert row["device_rows"] == [[4, 1], [3, 2]]
    np.testing.assert_allclose(row["device_megabytes"], [[0.008, 0.002], [0.006, 0.004]])


def test_drops_are_checked():
    load = logged_sums().load_E
    dropped = np.float32([[2, 0, 0, 0], [0, 0, 0, 0]])
    by = np.float32([[2, 0], [0, 0]])
    good = Ledger(load, load - dropped, dropped, by, by, by)
    row = training_row(
        step_metrics(router=logged_sums(ledger=good)), **{"model.moe.drop.capacity_factor": 1.0}
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
            training_row(step_metrics(router=logged_sums(ledger=bad)))


def test_running_load_forgets_and_survives():
    """Against the sum over all steps with weights 0.99^age."""
    rng, running, sum_LE = np.random.default_rng(0), rows.RunningLoad(), 0.0
    for step in range(300):
        load = rng.integers(1, 100, (2, 4)).astype(np.float32)
        running.add(step_metrics(router=logged_sums(load_E=load)))
        sum_LE = sum_LE + 0.99 ** (299 - step) * load.astype(np.float64)
        if step == 200:
            running = rows.RunningLoad(json.loads(json.dumps(running.saved())))
    want = sum_LE.max(axis=1) / sum_LE.mean(axis=1) - 1
    np.testing.assert_allclose(running.row()["maxvio_running"], want, rtol=1e-6)
    assert rows.RunningLoad().row() == {}


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
            {"router": logged_sums(token_sums={"z": np.float32([np.inf, 1])}), "grad_norm": np.inf},
            "router_z",
        ),
    ],
)
def test_the_first_metric_that_is_not_finite(changes, name):
    found = rows.first_non_finite(step_metrics(**changes))
    assert found is not None
    assert found[0] == name
    assert not math.isfinite(found[1])
    assert rows.first_non_finite(step_metrics(router=logged_sums())) is None
