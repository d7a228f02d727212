"""The arithmetic behind docs/scale.md."""

import itertools

import numpy as np
import pytest

from benchmarks import scale
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.planning import planner


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 2, 4), (4, 4, 4), (4, 4), (8, 8, 8)])
def test_hops_are_those_of_a_torus(shape):
    """Against counting: every chip from the first, the shorter way round."""
    ways = [
        sum(min(x, side - x) for x, side in zip(place, shape, strict=True))
        for place in itertools.product(*map(range, shape))
    ]
    assert scale.hops(int(np.prod(shape)), len(shape)) == np.mean(ways)


def test_a_step_on_64_chips():
    config = scale.load("dsmoe_16b")
    best = {name: scale.costs(config, "v5p", 64, name)[0] for name in scale.DISPATCHES}
    limit = planner.USABLE * CHIPS["v5p"].hbm_gb
    for cost in best.values():
        assert cost.plan.used <= limit
        assert cost.compute == pytest.approx(best["all_to_all"].compute)
        assert cost.seconds >= cost.compute
    # 2.8B activated parameters without the embedding, and attention, forward and backward, again:
    assert 8 < best["all_to_all"].compute * 459e12 * 64 / (4608 * 4096 * 2.8e9) < 10


def test_what_grows_with_the_expert_shards():
    """Everything for `all_gather`; what is sent to chosen chips has an end."""
    shares = {
        name: dict(points)
        for name, points in scale.exchange_by_shards(scale.load("dsmoe_16b"), "v5p").items()
    }
    gathered = shares["all_gather"]
    assert gathered[64] == pytest.approx(gathered[8] * 63 / 7, rel=0.01)
    assert shares["all_to_all"][64] < gathered[64] / 2
    assert shares["device-limited"][8] < 0.8 * shares["all_to_all"][8]
