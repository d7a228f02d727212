"""The table of logical axes, and meshes that cannot be."""

import functools

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dsmoe_jax.config import MeshConfig
from dsmoe_jax.config.mesh import AXES
from dsmoe_jax.parallel import sharding
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.start import state_shapes
from tests.tools.tiny import tiny

SMALL = {
    "model.hidden_size": 24,
    "model.moe.n_routed_experts": 6,
    "model.moe.moe_intermediate_size": 10,
}


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("EFD", P("expert", "tensor", "fsdp")),
        ("EDF", P("expert", "fsdp", "tensor")),
        ("LEFD", P("stage", "expert", "tensor", "fsdp")),
        ("FD", P("tensor", ("fsdp", "expert"))),
        ("NHD", P("tensor", None, ("fsdp", "expert"))),
        ("VD", P("tensor", ("fsdp", "expert"))),
        ("BSD", P(("stage", "data", "fsdp", "expert"), None, None)),
        ("BSNH", P(("stage", "data", "fsdp", "expert"), None, "tensor", None)),
    ],
)
def test_an_axis_of_the_mesh_splits_an_array_once(letters, expected):
    assert sharding.spec(letters) == expected


def test_an_unknown_letter_is_refused():
    with pytest.raises(ValueError, match=r"logical axis 'X' of 'XD': must be one of"):
        sharding.spec("XD")


def test_moments_are_sharded_like_their_parameters():
    """By name, all of them: `jax.jit(optimizer.init)` would leave them on every device."""
    specs = sharding.specs(state_shapes(tiny(**SMALL)))
    adam = specs.opt_state[1][0]
    leaves = functools.partial(jax.tree.leaves, is_leaf=lambda x: isinstance(x, P))
    params = leaves(specs.params)
    assert leaves(adam.mu) == leaves(adam.nu) == params
    assert P("stage", "expert", "tensor", "fsdp") in params
    assert adam.count == specs.step == P()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, r"mesh.data=0: must be > 0, or -1"),
        ({"fsdp": -1}, r"mesh.data=-1: only one axis can be what is left, here data and fsdp are"),
    ],
)
def test_a_section_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"fsdp": 3}, 8, r"mesh.fsdp=3: .*: 3 must divide the 8 devices there are"),
        ({"data": 2, "expert": 2}, 8, r"mesh.data=2: .*: 4 must be the 8 devices there are"),
        ({"fsdp": 16}, 8, r"mesh.fsdp=16: .*: 16 must divide the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(sizes, devices, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes).sizes(devices)


def test_what_is_left_goes_to_one_axis():
    sizes = {"stage": 1, "data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert MeshConfig(expert=4).sizes(8) == sizes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 4}, r"mesh.expert=4: must divide the routed experts 6 of .*moe/\w+_E"),
        ({"tensor": 4}, r"mesh.tensor=4: must divide the key/value heads 2 of .*key_MHD"),
        ({"fsdp": 16}, r"mesh.fsdp=16: must divide the hidden size 24 of"),
        ({"fsdp": 4, "expert": 4}, r"mesh.expert=4: must divide \(fsdp x expert = 16\) the hidden"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(sizes, message):
    state = state_shapes(tiny(**SMALL))
    with pytest.raises(ValueError, match=message) as caught:
        sharding.check(state, {**dict.fromkeys(AXES, 1), **sizes})
    assert "\n" not in str(caught.value)


def test_a_mesh_that_does_not_divide_the_batch(monkeypatch):
    """The mesh must divide the micro-batches: they are split."""
    config = tiny(**SMALL, **{"train.global_batch_size": 6})
    mesh = jax.sharding.AbstractMesh((1, 4, 1, 1, 1), AXES)
    monkeypatch.setattr("dsmoe_jax.training.devices.make_mesh", lambda *_: mesh)
    with pytest.raises(ValueError, match=r"train.global_batch_size=6: must be a multiple of 4:"):
        open_mesh(config)


def test_without_a_mesh_nothing_is_asked_for():
    x = jax.numpy.ones((3, 2))
    assert sharding.constrain(x, "BS") is x
    assert sharding.shardings({"w_FD": x}) is None
    assert sharding.local_rows(3) == [0, 1, 2]
