"""The times of single steps, as a thread beside the loop sees them."""

import time

import numpy as np

from dsmoe_jax.training.clock import DeviceClock


class Output:
    """A result that is there after some seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def block_until_ready(self):
        time.sleep(self.seconds)


def wait_for(clock, n):
    end = time.monotonic() + 20
    while clock._finished < n:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_percentiles_of_the_steps():
    """One slow step of twenty; what lies between two laps, an evaluation, is in none of them."""
    clock = DeviceClock()
    assert clock.percentiles() == {}
    for i in range(10):
        clock.dispatched(Output(0.2 if i == 4 else 0.005))
    wait_for(clock, 10)
    clock.restart()
    time.sleep(1.0)
    for _ in range(10):
        clock.dispatched(Output(0.005))
    wait_for(clock, 20)
    found = clock.percentiles()
    clock.close()
    assert list(found) == ["p50", "p95", "p99"]
    assert 0.005 <= found["p50"] < 0.15
    assert found["p50"] <= found["p95"] <= found["p99"]
    assert 0.15 < found["p99"] < 0.9
    np.testing.assert_allclose(found["p95"], np.percentile(clock._steps, 95))


def test_a_host_that_is_late_makes_its_step_longer():
    """As the run sees it: the device waited for the host."""
    clock = DeviceClock()
    clock.dispatched(Output(0.001))
    wait_for(clock, 1)
    time.sleep(0.1)
    clock.dispatched(Output(0.001))
    wait_for(clock, 2)
    clock.close()
    assert clock._steps[1] > 0.1 > clock._steps[0]
