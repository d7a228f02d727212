"""The text of a program: bytes of types, and loops that say how often they run."""

import pytest

from dsmoe_jax.planning import hlo

LOOP = """\
%body (c: (s32[])) -> (s32[]) {
  ROOT %c = (s32[]) parameter(0)
}
%condition (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %three), direction=LT, metadata={op_name="a/b[\\'c\\']/lt"}
}
ENTRY %main (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  ROOT %loop = (s32[]) while(%p), condition=%condition, body=%body
}
"""  # noqa: E501


def test_bytes_of_types():
    assert hlo.n_bytes("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == 2048
    assert hlo.n_bytes("(f32[], /*index=1*/pred[3]{0}, s4[4]{0}, f8e4m3fn[2], token[])") == 11


@pytest.mark.parametrize(
    ("kind", "padded", "in_hbm"),
    [
        ("f32[6,7]", 6 * 7 * 4, True),
        ("f32[6,7]{1,0}", 6 * 7 * 4, True),
        ("f32[6,7]{1,0:T(8,128)}", 8 * 128 * 4, True),
        ("f32[6,130]{0,1:T(8,128)}", 136 * 128 * 4, True),  # columns of 6 numbers
        ("bf16[3,9,200]{2,1,0:T(8,128)(2,1)}", 3 * 16 * 256 * 2, True),
        ("bf16[5]{0:T(1024)(128)(2,1)S(1)}", 1024 * 2, False),
        ("u32[]{:S(2)}", 4, False),
    ],
)
def test_whole_tiles_and_spaces(kind, padded, in_hbm):
    (array,) = hlo.arrays(kind)
    assert (array.padded, array.in_hbm) == (padded, in_hbm)


def test_a_loop_runs_as_often_as_its_condition_says():
    program = hlo.parse(LOOP)
    (loop,) = (i for i in program.computations[program.entry] if i.opcode == "while")
    assert loop.is_root
    assert program.trips(loop) == 3
    assert program.computations["condition"][-1].words == ["a", "b", "c", "lt"]
    known = 'backend_config={"known_trip_count":{"n":"7"}}'  # a CPU's compiler says it
    assert program.trips(loop._replace(attributes=known)) == 7


def test_a_loop_that_the_data_end_says_nothing():
    program = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
    assert program.trips(program.computations[program.entry][-1]) is None
