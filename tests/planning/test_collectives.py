"""Programs written by hand: what travels, how often, and what is computed meanwhile."""

import pytest

from dsmoe_jax.planning import collectives

# Three micro-batches of two layers.  Bytes are those of the operands.
PROGRAM = """\
HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: bf16[64]) -> bf16[16] {
  %p = bf16[64]{0:T(1024)(128)(2,1)} parameter(0)
  %all = bf16[64]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add.1
  ROOT %mine = bf16[16]{0} dynamic-slice(%all, %zero), dynamic_slice_sizes={16}
}

%product (x: bf16[16,8]) -> bf16[16,8] {
  %x.1 = bf16[16,8]{1,0} parameter(0)
  %p.2 = bf16[16,8]{1,0} convolution(%x.1, %w.2), dim_labels=bf_oi->bf, metadata={op_name="jit(step)/moe/shared_experts/dot_general"}
  ROOT %sum.1 = bf16[16,8]{1,0} add(%p.2, %x.1), metadata={op_name="jit(step)/moe/add"}
}

%layer (c: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %c = (s32[], /*index=1*/bf16[16,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %rows = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%c), index=1
  %room = bf16[64,8]{1,0} broadcast(%zero), dimensions={}
  %go = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) ragged-all-to-all-start(%rows, %room, %a, %b, %d, %e), replica_groups={{0,1,2,3},{4,5,6,7}}
  %shared.1 = bf16[16,8]{1,0} fusion(%rows), kind=kOutput, calls=%product, metadata={op_name="jit(step)/moe/add"}
  %came = bf16[64,8]{1,0} ragged-all-to-all-done(%go)
  %back = bf16[16,8]{1,0} ragged-all-to-all(%came, %rows, %a, %b, %d, %e), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %t = (s32[], bf16[16,8]{1,0}) tuple(%n, %back)
}

%cond (c: (s32[], bf16[16,8])) -> pred[] {
  %two = s32[]{:T(128)} constant(2)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %two), direction=LT, metadata={op_name="lt"}
}

%cond.1 (c: (s32[], bf16[16,8])) -> pred[] {
  %three = s32[] constant(3)
  ROOT %less = pred[]{:T(512)} compare(%n, %three), direction=LT
}

%begin (p: f32[10]) -> f32[40] {
  %p = f32[10]{0} parameter(0)
  ROOT %weight = f32[40]{0} all-gather(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
}

%async_collective_fusion.1 (p: f32[10]) -> f32[40] {
  %p = f32[10]{0} parameter(0)
  ROOT %weight = f32[40]{0} all-gather(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%micro (c: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %w = f32[10]{0} get-tuple-element(%c), index=2
  %async-collective-start.1 = f32[40]{0} fusion(%w), kind=kCustom, calls=%begin
  %meanwhile = f32[40]{0} fusion(%w), kind=kCustom, calls=%async_collective_fusion.1
  %async-collective-done.1 = f32[40]{0} fusion(%w), kind=kCustom, calls=%begin
  %layers = (s32[], bf16[16,8]{1,0}) while(%c), condition=%cond, body=%layer, metadata={op_name="jit(step)/while"}
  ROOT %t.1 = (s32[], bf16[16,8]{1,0}) tuple(%n, %layers)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p.1 = bf16[64]{0} parameter(0)
  %micros = (s32[], bf16[16,8]{1,0}) while(%init), condition=%cond.1, body=%micro
  %part = bf16[16]{0} fusion(%p.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %norm = bf16[64]{0} all-reduce(%p.1), replica_groups={{0,1}}, to_apply=%add.1
}
"""  # noqa: E501


def test_every_collective_counts_as_often_as_it_runs():
    found = collectives.by_kind(collectives.traffic(PROGRAM))
    rows = 16 * 8 * 2 * 3 / 4  # to and from three other devices of four
    assert found == pytest.approx(
        {
            "all-gather": 3 * 40 * 3 / 1e9,
            "reduce-scatter": 64 * 2 * 3 / 4 / 1e9,
            "all-reduce": 2 * 64 * 2 / 2 / 1e9,
            "ragged-all-to-all": 3 * 2 * 2 * rows / 1e9,
        }
    )


def test_what_is_computed_while_tokens_travel():
    assert collectives.overlap(PROGRAM) == collectives.Overlap(2, 1, 1, 1)
    without = PROGRAM.replace("moe/shared_experts/", "moe/")
    assert collectives.overlap(without) == collectives.Overlap(2, 1, 1, 0)
    without = PROGRAM.replace("convolution(", "add(")  # no product, only its leftovers
    assert collectives.overlap(without) == collectives.Overlap(2, 1, 1, 0)


def test_a_loop_must_say_how_often_it_runs():
    with pytest.raises(ValueError, match="layers: its condition does not say"):
        collectives.traffic(PROGRAM.replace("direction=LT, metadata", "direction=NE, metadata"))


def test_of_a_conditional_the_branch_that_moves_most():
    before = PROGRAM.split("ENTRY")[0]
    program = f"""{before}
%nothing (q: f32[10]) -> f32[10] {{
  ROOT %q = f32[10]{{0}} parameter(0)
}}
%again (q: f32[10]) -> f32[10] {{
  %q = f32[10]{{0}} parameter(0)
  ROOT %twice = f32[10]{{0}} all-to-all(%q), replica_groups=[1,2]<=[2], dimensions={{0}}
}}
ENTRY %main (p: f32[8]) -> f32[8] {{
  ROOT %x = f32[10]{{0}} conditional(%pred, %w, %w), branch_computations={{%nothing, %again}}
}}
"""
    moved = pytest.approx({"all-to-all": 20 / 1e9})
    assert collectives.by_kind(collectives.traffic(program)) == moved


@pytest.mark.parametrize(
    ("kind", "received"),
    [
        ("all-gather", 40 * 3),
        ("reduce-scatter", 40 * 3 / 4),
        ("all-reduce", 2 * 40 * 3 / 4),
        ("all-to-all", 40 * 3 / 4),
        ("collective-permute", 40),
    ],
)
def test_what_a_chip_of_four_receives(kind, received):
    program = f"""
ENTRY %main (p: f32[10]) -> f32[10] {{
  %p = f32[10]{{0}} parameter(0)
  ROOT %x = f32[10]{{0}} {kind}(%p), replica_groups=[2,4]<=[8]
}}
"""
    found = collectives.by_kind(collectives.traffic(program))
    assert found == pytest.approx({kind: received / 1e9})
