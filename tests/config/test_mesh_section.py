"""The section `mesh`: sizes, and the fallbacks of a run that goes on with other hardware."""

import pytest

from dsmoe_jax.config.mesh import MeshConfig, parse

EIGHT = MeshConfig(
    data=1, fsdp=4, expert=2, fallbacks=("data=1,fsdp=4", "fsdp=2,accumulation_steps=2")
)


@pytest.mark.parametrize(
    ("devices", "sizes", "steps"),
    [
        (8, {"stage": 1, "data": 1, "fsdp": 4, "expert": 2, "tensor": 1}, None),
        (4, {"stage": 1, "data": 1, "fsdp": 4, "expert": 1, "tensor": 1}, None),
        (2, {"stage": 1, "data": 1, "fsdp": 2, "expert": 1, "tensor": 1}, 2),
        (16, {"stage": 1, "data": 8, "fsdp": 2, "expert": 1, "tensor": 1}, 2),
    ],
)
def test_the_first_that_fits_is_taken(devices, sizes, steps):
    mesh, accumulation = EIGHT.fitting(devices)
    assert (mesh.sizes(devices), accumulation) == (sizes, steps)
    assert mesh.fallbacks == EIGHT.fallbacks  # for the next time


def test_none_fits():
    with pytest.raises(ValueError, match=r"mesh.fsdp=4: .* the 3 devices there are, nor does one"):
        EIGHT.fitting(3)
    with pytest.raises(ValueError, match=r"must be the 3 devices there are$"):
        MeshConfig(data=1, fsdp=4).fitting(3)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("fsdp=two", r"'fsdp=two' must be AXIS=NUMBER"),
        (
            "rows=2",
            r"'rows=2' must be AXIS=NUMBER, the axis one of stage, .*accumulation_steps",
        ),
        ("data=-1,fsdp=-1", r"only one axis can be what is left"),
        ("fsdp=0", r"mesh.fsdp=0: must be > 0"),
        ("fsdp=2,accumulation_steps=0", r"accumulation_steps=0: must be > 0"),
        ("", r"'' must be AXIS=NUMBER"),
    ],
)
def test_what_is_no_mesh_is_refused_before_it_is_needed(text, wrong):
    with pytest.raises(ValueError, match=rf"mesh.fallbacks: .*{wrong}"):
        MeshConfig(fallbacks=("data=1", text))


def test_a_command_takes_no_micro_batches_there():
    with pytest.raises(ValueError, match=r"--mesh: 'accumulation_steps=2' must be AXIS=NUMBER"):
        parse("fsdp=2,accumulation_steps=2", "--mesh")
