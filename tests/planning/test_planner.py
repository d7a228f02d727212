"""The planner counts the state by its shards, takes what fits, and refuses with the numbers."""

import dataclasses
import math

import jax
import pytest

from configs import dsmoe_2b, dsmoe_16b, dsmoe_145b
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.parallel import sharding
from dsmoe_jax.planning import plan_report, planner
from dsmoe_jax.training.start import state_shapes


@pytest.fixture(scope="module")
def small():
    return from_config_dict(dsmoe_2b.get_config("proxy"))


def test_state_is_counted_by_the_shards(small):
    """Against the shapes that JAX itself cuts."""
    state = state_shapes(small)
    sizes = {"data": 2, "fsdp": 2, "expert": 3, "tensor": 2}
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    local = 0
    for path, x in jax.tree.leaves_with_path(state.params):
        spec = sharding.array_spec(path, x.shape)
        local += math.prod(jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape))
    one, two = (planner.estimate(small, state, sizes, n) for n in (1, 2))
    assert one.memory["parameters"] == pytest.approx(4 * local / 1e9)
    assert one.memory["moments"] == pytest.approx(8 * local / 1e9)
    assert one.memory["gradients"] == pytest.approx(4 * local / 1e9)
    assert two.memory["gradients"] == pytest.approx(8 * local / 1e9)  # and those of all so far
    # From one other replica, half of the sum and half of the result; weights for each micro-batch.
    assert one.traffic["replicas"] == two.traffic["replicas"] == pytest.approx(4 * local / 1e9)
    assert two.traffic["weights"] == pytest.approx(2 * one.traffic["weights"])


def test_one_chip_moves_nothing(small):
    plan, _ = planner.propose(small, "h100", 1)
    assert plan.sizes == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    assert plan.traffic == {}


def test_the_proposal_fits_and_no_other_that_fits_is_faster(small):
    plan, plans = planner.propose(small, "v5e", 16)
    limit = planner.USABLE * CHIPS["v5e"].hbm_gb
    assert plan.used <= limit
    assert math.prod(plan.sizes.values()) == 16
    seconds = plan.bounds(small, "v5e").serial
    assert all(p.bounds(small, "v5e").serial >= seconds for p in plans if p.used <= limit)
    text = plan_report.describe(small, plan, plans, "v5e")
    assert f"--config.mesh.fsdp={plan.sizes['fsdp']}" in text
    assert "without" in text


def test_room_for_the_worst_case_costs_hbm():
    """16B with experts on eight chips: what the buffers move is as large as they are."""
    config = from_config_dict(dsmoe_16b.get_config())
    sizes = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}
    state = state_shapes(config)

    def hbm(buffer_factor, n_micro=36):
        other = replace(config, **{"model.moe.dispatch.buffer_factor": buffer_factor})
        return planner.estimate(other, state, sizes, n_micro).hbm

    rows = "experts and dispatch"
    # The worst case is eight times the mean: six chosen experts, all of them on one of the chips.
    two_more = hbm(4.0)[rows] - hbm(2.0)[rows]
    # 82 and 74 bytes for each number of a row, as docs/scale.md reads off the compiled program.
    mean_rows = 8192 * 6
    in_bytes = 27 * 36 * 2 * mean_rows * (82 * 2048 + 74 * 1408)
    assert two_more == pytest.approx(in_bytes / 1e9)
    assert hbm(None)[rows] - hbm(4.0)[rows] == pytest.approx(2 * two_more, rel=0.001)
    attention = "attention and projections"
    assert hbm(None)[attention] == pytest.approx(hbm(None, 72)[attention])
    assert hbm(None, 72)["weights"] == pytest.approx(2 * hbm(None)["weights"])


def test_what_cannot_fit_is_refused_with_the_numbers():
    """145B: 2.3 TB of parameters, moments and gradients alone, on 256 GB."""
    config = from_config_dict(dsmoe_145b.get_config())
    with pytest.raises(ValueError, match=r"does not fit 16 v5e of 16 GB .*parameters \d") as caught:
        planner.propose(config, "v5e", 16)
    least = float(str(caught.value).split("the least is ")[1].split(" GB")[0])
    assert least > 144e9 * 16 / 16 / 1e9


def test_other_bad_input(small):
    with pytest.raises(ValueError, match=r"--chip=v9: must be one of v4, v5e"):
        planner.propose(small, "v9", 1)
    with pytest.raises(ValueError, match=r"--chips=7: no mesh of 7 .*; expert 1; tensor \d"):
        planner.propose(small, "v5p", 7)


def test_an_axis_that_nothing_divides_is_said_with_what_it_must_divide():
    """63 experts, but a hidden size of 1280 and 2048 sequences: no number but 1 divides all."""
    config = from_config_dict(dsmoe_2b.get_config())
    plan, plans = planner.propose(config, "v5p", 64)
    text = plan_report.describe(config, plan, plans, "v5p")
    assert "with expert: no such mesh; it must divide batch of 2048, " in text
    assert "routed experts 63" in text


def test_the_mesh_of_the_config_is_examined(monkeypatch):
    config = from_config_dict(dsmoe_145b.get_config())
    given = {"mesh.data": 1, "mesh.fsdp": 16, "mesh.expert": 16}
    config = replace(config, **given, **{"train.accumulation_steps": 18})
    plan = planner.examine(config, "v5p", 256)
    assert plan.sizes == {"data": 1, "fsdp": 16, "expert": 16, "tensor": 1}
    with pytest.raises(ValueError, match=r"does not fit 256 v5e .*takes \d.*fsdp 16 x expert"):
        planner.examine(config, "v5e", 256)
    with pytest.raises(ValueError, match=r"train.accumulation_steps=36: .*256 must divide"):
        planner.examine(replace(config, **{"train.accumulation_steps": 36}), "v5p", 256)
    with pytest.raises(ValueError, match=r"mesh.expert=256: must divide the routed experts 128"):
        planner.examine(replace(config, **{"mesh.fsdp": 1, "mesh.expert": 256}), "v5p", 256)
    full = dataclasses.replace(CHIPS["v5p"], hbm_gb=plan.used / 0.95)
    monkeypatch.setitem(CHIPS, "v5p", full)
    with pytest.raises(ValueError, match="does not fit 256 v5p"):
        planner.examine(config, "v5p", 256)
