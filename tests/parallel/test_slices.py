"""Several slices: which devices lie where, what crosses, and that the numbers stay the same."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import dsmoe_16b
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.config.mesh import MeshConfig, across_slices
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.parallel import mesh
from dsmoe_jax.parallel.mesh import make_mesh, slices_of
from dsmoe_jax.planning import planner
from dsmoe_jax.training.start import state_shapes


def chips(n, *, platform="cpu", processes=1, slices=1):
    """Devices as a runtime lists them: the last slice first, to see that they are sorted."""
    found = [
        SimpleNamespace(
            id=i,
            platform=platform,
            process_index=i * processes // n,
            slice_index=i * slices // n,
            device_kind="",
        )
        for i in range(n)
    ]
    return found[::-1]


def slices_by_id(*args, **kwargs):
    return [sorted(d.id for d in one) for one in slices_of(*args, **kwargs)]


def test_devices_of_a_slice():
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert slices_by_id(chips(8, platform="tpu", slices=2)) == halves, "TPUs say so"
    assert slices_by_id(chips(8, platform="tpu", slices=2), 2) == halves
    assert slices_by_id(chips(8, processes=4, slices=4)) == [[*range(8)]], "others do not"
    assert slices_by_id(chips(8, processes=4), 2) == halves, "two processes each"
    assert slices_by_id(chips(8), 2) == halves


@pytest.mark.parametrize(("given", "devices", "says"), [
    ({"slices": 3}, chips(8, platform="tpu", slices=2), "mesh.slices=3: the devices are in 2 sl"),
    ({"slices": 3}, chips(8, processes=4), "mesh.slices=3: must divide the 4 processes there are"),
    ({"slices": 3}, chips(8), "mesh.slices=3: must divide the 8 devices there are"),
    ({"slices": 2, "data": 1, "fsdp": 8}, chips(8), "mesh.slices=2: must divide mesh.data=1,"),
    ({"slices": 4, "data": 2, "fsdp": 4}, chips(8), "mesh.slices=4: must divide mesh.data=2,"),
])  # fmt: skip
def test_slices_that_do_not_divide_are_refused(given, devices, says):
    with pytest.raises(ValueError, match=says) as caught:
        make_mesh(MeshConfig(**given), devices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slices", [0, -2])
def test_a_number_of_slices_that_cannot_be(slices):
    with pytest.raises(ValueError, match=rf"mesh\.slices={slices}: must be > 0, or -1"):
        MeshConfig(slices=slices)


def test_the_outer_axes_cross():
    sizes = {"stage": 1, "data": 6, "fsdp": 4, "expert": 2, "tensor": 1}
    assert across_slices(sizes, 3) == {"stage": 1, "data": 3, "fsdp": 1, "expert": 1, "tensor": 1}


def test_two_axes_that_cross():
    """The part of each axis across slices comes first, as for stages beside data."""
    slices = slices_of(chips(8), 4)
    arranged = mesh._arranged(slices, inner=(2, 1), outer=(2, 2))
    of_slice = np.vectorize(lambda device: device.id // 2)(arranged)
    np.testing.assert_array_equal(of_slice, [[0, 1], [0, 1], [2, 3], [2, 3]])


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "sizes", [{"stage": 1, "data": 4, "fsdp": 2}, {"stage": 1, "data": 2, "fsdp": 2, "tensor": 2}]
)
def test_data_goes_from_slice_to_slice_and_the_rest_stays(sizes):
    """Whatever the order of the devices.  That a step is the same: test_meshes and test_hosts."""
    two = make_mesh(MeshConfig(**sizes, slices=2), jax.devices()[::-1])
    assert two.shape == {"stage": 1, "data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes
    halves = [{d.id for d in half.flat} for half in np.split(two.devices, 2, axis=1)]
    assert halves == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    one = make_mesh(MeshConfig(**sizes), jax.devices()[::-1])
    assert {d.id for d in np.split(one.devices, 2, axis=1)[0].flat} == {4, 5, 6, 7}, (
        "as they are listed"
    )


class TestPlan:
    """By hand: gradients are summed inside of a slice first, each chip with its part of them."""

    def test_gradients_cross_and_nothing_else(self):
        config = from_config_dict(dsmoe_16b.get_config())
        state = state_shapes(config)
        sizes = {"stage": 1, "data": 8, "fsdp": 8, "expert": 1, "tensor": 1}

        def plan(slices):
            return planner.estimate(replace(config, **{"mesh.slices": slices}), state, sizes, 8)

        one, two, eight = map(plan, (1, 2, 8))
        gradient = one.memory["parameters"]
        assert one.sliced == {}
        assert one.traffic["replicas"] == pytest.approx(2 * gradient * 7 / 8)
        assert two.sliced == {"replicas": pytest.approx(2 * gradient / 4 * 1 / 2)}
        assert two.traffic["replicas"] == pytest.approx(2 * gradient * 3 / 4)
        assert eight.sliced == {"replicas": pytest.approx(2 * gradient * 7 / 8)}
        assert "replicas" not in eight.traffic
        rest = {name: gb for name, gb in one.traffic.items() if name != "replicas"}
        assert {name: gb for name, gb in two.traffic.items() if name != "replicas"} == rest
        network = two.moved * 1e9 / 600e9 + two.sliced["replicas"] * 1e9 / 6.25e9
        assert two.bounds(config, "v5p").network == pytest.approx(network)

    def test_the_proposal_has_its_slices(self):
        config = replace(from_config_dict(dsmoe_16b.get_config()), **{"mesh.slices": 2})
        plan, plans = planner.propose(config, "v5p", 128)
        assert all(p.sizes["data"] % 2 == 0 for p in plans)
        assert "--config.mesh.slices=2" in planner.flags(plan)
        given = {f"mesh.{axis}": size for axis, size in plan.sizes.items()}
        n_micro = {"train.accumulation_steps": plan.accumulation_steps}
        assert planner.examine(replace(config, **given, **n_micro), "v5p", 128) == plan
        with pytest.raises(ValueError, match=r"mesh.slices=2: must divide mesh.data=1"):
            planner.examine(replace(config, **{"mesh.data": 1, "mesh.fsdp": 128}), "v5p", 128)

    def test_every_chip_has_a_network_between_slices(self):
        assert all(chip.between_slices < chip.link_bandwidth / 5 for chip in CHIPS.values())
