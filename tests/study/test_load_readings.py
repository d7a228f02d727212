"""Readings of the held-out load, against numbers that were worked out by hand."""

import numpy as np
import pytest

from dsmoe_jax.study import load_readings
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.readings import Outcome
from tests.tools.tiny import tiny

LOAD = [[10, 0, 30, 0, 20, 40], [1, 1, 1, 1, 1, 5]]


def evaluation(**loads):
    return {
        "load_by_domain": loads,
        "domains": {name: {"tokens": np.sum(load)} for name, load in loads.items()},
    }


def test_the_busiest_experts():
    assert load_readings.busiest_share(np.array(LOAD), 3) == pytest.approx((0.9 + 0.7) / 2)
    assert load_readings.busiest_share(np.array(LOAD), 6) == 1.0


def test_devices_hold_experts_in_their_order():
    load = np.array(LOAD)
    # Two devices: 40 and 60 of a mean of 50; 3 and 7 of a mean of 5.
    assert load_readings.device_maxvio(load, 2) == pytest.approx((0.2 + 0.4) / 2)
    # Three: 10, 30, 60 of 33.3; 2, 2, 6 of 3.3.
    assert load_readings.device_maxvio(load, 3) == pytest.approx((0.8 + 0.8) / 2)
    assert load_readings.device_maxvio(load, 1) is None


def test_languages_and_kinds_are_told_apart():
    """One expert serves all German, and the others do not know the kind of text."""
    one = [[1000, 0, 0]]
    other = [[0, 500, 500]]
    found = evaluation(
        de_speech=one, nl_speech=other, en_speech=other, en_news=other, code_c=one, dialogue=one
    )
    by_language = load_readings.by_language(found)
    # Of three equal parts one is alone: entropy of (1/3, 2/3) over ln 3; the bias is below 1e-3.
    expected = (np.log(3) / 3 + np.log(1.5) * 2 / 3) / np.log(3)
    assert by_language == pytest.approx(expected, abs=2e-3)
    assert load_readings.by_kind(found) == 0.0


def test_without_two_alike_there_is_no_number():
    assert load_readings.by_language({}) is None
    found = evaluation(de_speech=[[1000, 0]], en_news=[[0, 1000]], code_c=[[1000, 0]])
    assert load_readings.by_language(found) is None
    assert load_readings.by_kind(found) is None
    few = evaluation(de_speech=[[10, 0]], en_speech=[[0, 10]])
    assert load_readings.by_language(few) is None


def test_measures_read_them():
    config = tiny()
    rows = [{"loss": 5.0}, {"loss": 4.0}, {"loss": 4.75}, {"loss": 3.0}, {"loss": 3.5}, {}]
    outcome = Outcome(config, config, rows, {"load": LOAD})
    read = {name: MEASURES[name].read(outcome) for name in ("busiest_three", "loss_rise")}
    assert read == {"busiest_three": pytest.approx(80.0), "loss_rise": pytest.approx(0.75)}
    assert MEASURES["device_maxvio"].read(outcome) is None
    nothing = Outcome(config, config)
    assert all(MEASURES[name].read(nothing) is None for name in (*read, "language_over_kind"))
