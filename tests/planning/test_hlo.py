"""The text of a program: bytes of types, and loops that say how often they run."""

import jax
import jax.numpy as jnp
import pytest

from dsmoe_jax.moe import blocks
from dsmoe_jax.moe.dispatch import Arrived
from dsmoe_jax.moe.experts import BACKENDS, JoinedWeights
from dsmoe_jax.moe.types import Routing
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
    (found,) = (i for i in program.computations[program.entry] if i.opcode == "while")
    assert found.is_root
    assert program.trips(found) == 3
    assert program.computations["condition"][-1].words == ["a", "b", "c", "lt"]
    known = 'backend_config={"known_trip_count":{"n":"7"}}'  # a CPU's compiler says it
    assert program.trips(found._replace(attributes=known)) == 7


def test_a_loop_that_the_data_end_says_nothing():
    program = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
    assert program.trips(program.computations[program.entry][-1]) is None


def test_a_loop_that_the_data_end_runs_as_often_as_its_scope_expects():
    """A scope in a scope: the innermost counts.  Where the program knows the trips, it is right."""
    program = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
    data_ends = program.computations[program.entry][-1]
    named = ', metadata={op_name="jit(f)/usual_trips_9/dispatch/usual_trips_4/while"}'
    expected = data_ends._replace(attributes=data_ends.attributes + named)
    assert program.trips(expected) == 4
    known = hlo.parse(LOOP)
    counted = known.computations[known.entry][-1]
    assert known.trips(counted._replace(attributes=counted.attributes + named)) == 3


def test_blocks_of_rows_name_their_trips():
    """The loops of moe/blocks.py, in a program compiled here."""
    usual = blocks.Usual(36, 10, 4.0)
    weights = JoinedWeights(jnp.ones((2, 6, 4)), jnp.ones((2, 4, 3)))

    @jax.jit
    def run(ids, x, gates, n_rows):
        arrived = Arrived(x, Routing(ids, gates, None), n_rows=n_rows)
        return blocks.weighted_sums(BACKENDS["loop"].run_weighted, arrived, weights, 128, usual)

    arguments = jnp.zeros((64, 2), jnp.int32), jnp.ones((64, 4)), jnp.ones((64, 2)), jnp.int32(9)
    program = hlo.parse(run.lower(*arguments).compile().as_text())
    loops = [i for lines in program.computations.values() for i in lines if i.opcode == "while"]
    trips = {program.trips(i) for i in loops}
    # Blocks of 21 for the usual 36 assignments; of 4 for 10 rows, and for 4 with several choices.
    assert {2, 3, 1} <= trips
    assert None not in trips
