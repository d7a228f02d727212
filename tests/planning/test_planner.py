"""The planner counts the state by its shards, takes what fits, and refuses with the numbers."""

import dataclasses
import json
import math

import jax
import pytest

from benchmarks import pipelines
from configs import dsmoe_2b, dsmoe_16b, dsmoe_145b
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.pipeline import Schedule
from dsmoe_jax.planning import plan_report, planner
from dsmoe_jax.training.start import state_shapes


@pytest.fixture(scope="module")
def small():
    return from_config_dict(dsmoe_2b.get_config("proxy"))


def test_state_is_counted_by_the_shards(small):
    """Against the shapes that JAX itself cuts."""
    state = state_shapes(small)
    sizes = {"stage": 1, "data": 2, "fsdp": 2, "expert": 3, "tensor": 2}
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
    assert set(plan.sizes.values()) == {1}
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


def test_room_for_the_worst_case_costs_memory_and_no_traffic():
    """16B with experts on eight chips: the rows that come are moved, not the room for others."""
    config = from_config_dict(dsmoe_16b.get_config())
    sizes = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}
    state = state_shapes(config)

    def plan(chunks=1, n_micro=36):
        other = replace(config, **{"model.moe.dispatch.chunks": chunks})
        return planner.estimate(other, state, sizes, n_micro)

    rows = "experts and dispatch"
    assert plan().hbm[rows] == pytest.approx(plan(chunks=4).hbm[rows])
    # Of each of 8192 x 6 rows 56 bytes of D and 55 of F; 45 of each weight of eight experts; of
    # each vector's visit to a chip 61 and twice 42; and of the shared experts' F 20 and twice 8.
    t, visits = 8192, 8 * 8192 * (1 - math.comb(56, 6) / math.comb(64, 6))
    in_bytes = t * 6 * (56 * 2048 + 55 * 1408) + 8 * 3 * 2048 * 1408 * 45
    in_bytes += visits * 145 * 2048 + t * 2 * 1408 * 36
    assert plan().hbm[rows] == pytest.approx(27 * 36 * in_bytes / 1e9)
    # The worst case is eight times the mean: six chosen experts, all of them on one of the chips.
    at_work = "a layer at work or logits"
    less = plan().memory[at_work] - plan(chunks=2).memory[at_work]
    assert less >= 2 * 2 * (8 * t * 6 * 2048 / 2) / 1e9  # two arrays of bfloat16
    less_again = plan(chunks=2).memory[at_work] - plan(chunks=4).memory[at_work]
    assert less_again == pytest.approx(less / 2)
    attention = "attention and projections"
    assert plan().hbm[attention] == pytest.approx(plan(n_micro=72).hbm[attention])
    assert plan(n_micro=72).hbm["weights"] == pytest.approx(2 * plan().hbm["weights"])


def test_scores_count_where_a_kernel_keeps_them():
    """24 bytes and twice 16 for each head, query and key of 16B: 16 heads and 4096 keys."""
    config = from_config_dict(dsmoe_16b.get_config())
    state = state_shapes(config)
    sizes = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}

    def attended(kernel):
        other = replace(config, **{"model.attention.kernel": kernel})
        return planner.estimate(other, state, sizes, 36).hbm["attention and projections"]

    scores = 8192 * 16 * 4096 * (27 * (2 * 16 + 24) + (16 + 24))
    assert attended("xla") - attended("auto") == pytest.approx(36 * scores / 1e9)
    assert attended("splash") == attended("auto")


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
    assert plan.sizes == {"stage": 1, "data": 1, "fsdp": 16, "expert": 16, "tensor": 1}
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


def test_stages_are_counted_by_the_shards_and_their_ticks():
    """16B in three stages of three groups: 72 micro-batches of one sequence, by hand."""
    config = from_config_dict(dsmoe_16b.get_config())
    sizes = {"stage": 3, "data": 16, "expert": 4}
    state = state_shapes(config)
    plan = planner.estimate(config, state, sizes, 72, schedule=Schedule(72, 3))
    mesh = jax.sharding.AbstractMesh(tuple(plan.sizes.values()), tuple(plan.sizes))
    local = 0
    for path, x in jax.tree.leaves_with_path(state.params):
        spec = sharding.array_spec(path, x.shape)
        local += math.prod(jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape))
    assert plan.memory["parameters"] == pytest.approx(4 * local / 1e9)
    vector = 2 * 4096 * 2048  # bytes of a micro-batch
    ticks = 3 * 72 + 2
    # A tick passes one micro-batch on, in both passes; all come to the first stage and go back.
    passed = (2 * ticks + 4 * 72 * 2 / 3) * vector
    assert plan.traffic["stages"] == pytest.approx(passed / 1e9)
    assert plan.idle == pytest.approx(2 / ticks)
    seconds = plan.bounds(config, "v5p")
    plain = dataclasses.replace(plan, schedule=None).bounds(config, "v5p")
    assert seconds.compute == pytest.approx(plain.compute * ticks / (ticks - 2))
    once = planner.estimate(config, state, sizes, 72, schedule=Schedule(72))
    assert once.idle == pytest.approx(2 / 74)
    assert "repeats" not in once.traffic
    few = planner.estimate(config, state, sizes, 72, schedule=Schedule(12))
    assert few.memory["activations kept"] < once.memory["activations kept"] / 4
    assert few.idle == pytest.approx(2 / 14)


def test_memory_of_stages_is_near_what_the_compiler_takes():
    """16B and 145B as they were compiled; without gathered experts, or leading layers, less."""
    reports = [json.loads(line) for line in pipelines.RESULTS.read_text().splitlines()]
    in_stages = [report for report in reports if report["mesh"]["stage"] > 1]
    assert {report["config"] for report in in_stages} == {"dsmoe_16b", "dsmoe_145b"}
    for report in in_stages:
        plan = pipelines.estimate(pipelines.changed(report), report["mesh"])
        assert plan.used == pytest.approx(report["used_gb"], rel=0.08), report["config"]


def test_stages_are_proposed_where_the_network_is_slow(monkeypatch):
    """With links of a two-hundredth the activations of three stages are the least to send."""
    config = from_config_dict(dsmoe_16b.get_config())
    fast, _ = planner.propose(config, "v5p", 24)
    assert fast.sizes["stage"] == 1
    slow = dataclasses.replace(CHIPS["v5p"], link_bandwidth=CHIPS["v5p"].link_bandwidth / 200)
    monkeypatch.setitem(CHIPS, "v5p", slow)
    plan, _ = planner.propose(config, "v5p", 24)
    assert plan.sizes["stage"] > 1
    assert plan.schedule is not None
    assert f"--config.train.pipeline_repeats={plan.schedule.repeats}" in planner.flags(plan)
    values = {f"mesh.{axis}": n for axis, n in plan.sizes.items()}
    values["train.accumulation_steps"] = plan.accumulation_steps
    values["train.pipeline_micro_batches"] = plan.schedule.micro_batches
    values["train.pipeline_repeats"] = plan.schedule.repeats
    assert planner.examine(replace(config, **values), "v5p", 24) == plan
