"""HBM traffic of small programs, by hand: compiled for a CPU, and texts as those for TPUs."""

import jax
import jax.numpy as jnp
import pytest

from dsmoe_jax.planning import memory_traffic
from dsmoe_jax.planning.memory_traffic import moves


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


INDEX = jax.ShapeDtypeStruct((), jnp.int32)
CONDITION = jax.ShapeDtypeStruct((), jnp.bool_)


def compiled(function, *arguments, **options):
    """Bytes read and written, without counters, and copies: how many is the compiler's choice."""
    text = jax.jit(function, **options).lower(*arguments).compile().as_text()
    assert text is not None
    found = [m for m in moves(text) if m.read + m.written > 64 and "copy" not in m.name]
    read = sum(m._replace(written=0).total for m in found)
    written = sum(m._replace(read=0).total for m in found)
    return read, written


def approx(*numbers):
    return pytest.approx(numbers, rel=0.02)  # indices, loop counters


def test_a_product():
    found = compiled(jnp.matmul, array(64, 32), array(32, 16))
    assert found == approx(4 * (64 * 32 + 32 * 16), 4 * 64 * 16)


def test_a_loop_of_products_counts_each():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    found = compiled(loop, array(8, 64), array(64, 64))
    assert found == approx(5 * 4 * (8 * 64 + 64 * 64), 5 * 4 * 8 * 64)


def test_loops_in_loops():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (jnp.sin(inner(x, w)), None), x, length=3)[0]

    found = compiled(outer, array(8, 64), array(64, 64))
    assert found == approx(3 * 4 * (5 * (8 * 64 + 64 * 64) + 8 * 64), 3 * 4 * (5 + 1) * 8 * 64)


def test_a_loop_that_the_data_end_counts_once_and_says_so():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)

    text = jax.jit(until).lower(array(64, 64), array(64, 64)).compile().as_text()
    assert text is not None
    inside = [m for m in moves(text) if m.counted_once and m.read > 4 * 64 * 64]
    assert [m.total for m in inside] == [3 * 4 * 64 * 64]


def test_a_layer_of_stacked_weights_is_read_alone():
    """The slice of seven layers reads one and writes it, and the product reads it."""

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    found = compiled(layers, array(8, 64), array(7, 64, 64))
    assert found == approx(7 * 4 * (8 * 64 + 2 * 64 * 64), 7 * 4 * (8 * 64 + 64 * 64))


def test_a_fusion_that_slices_reads_the_slice():
    def one_of(i, w):
        return 2 * jnp.sin(jax.lax.dynamic_index_in_dim(w, i, keepdims=False))

    assert compiled(one_of, INDEX, array(9, 64, 32)) == approx(4 * 64 * 32, 4 * 64 * 32)


def test_a_slice_in_place_of_one_row():
    def fill(room, x):
        def put(i, room):
            return jax.lax.dynamic_update_slice(room, x * i, (i, 0))

        return jax.lax.fori_loop(0, 6, put, room)

    found = compiled(fill, array(6, 512), array(1, 512), donate_argnums=0)
    assert found == approx(6 * 4 * 512, 6 * 4 * 512)


def test_of_branches_the_one_that_moves_most():
    one = approx(2 * 4 * 64 * 64, 4 * 64 * 64)

    def or_not(condition, x, w):
        return jax.lax.cond(condition, lambda x: x @ w, lambda x: x, x)

    assert compiled(or_not, CONDITION, array(64, 64), array(64, 64)) == one


@pytest.mark.parametrize("n_rows", [6, 300])
def test_gathered_rows_count_as_often_as_they_are_read(n_rows):
    rows = jax.ShapeDtypeStruct((n_rows,), jnp.int32)

    def take(i, x):
        return jnp.cos(x.at[i].get(mode="promise_in_bounds"))

    found = compiled(take, rows, array(100, 256))
    assert found == approx(4 * n_rows * 256, 4 * n_rows * 256)


def entry(lines, computations=""):
    """The text of a program whose entry has these lines."""
    return f"{computations}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"


def moved(text):
    return {m.name: (m.read, m.written) for m in moves(text)}


TILES = "{1,0:T(8,128)(2,1)}"
VMEM = "{1,0:T(8,128)(2,1)S(1)}"
SIZE = 16 * 128 * 2


def test_vmem_is_not_hbm():
    text = entry(f"""
  %p = bf16[16,128]{TILES} parameter(0)
  %start = (bf16[16,128]{VMEM}, bf16[16,128]{TILES}, u32[]{{:S(2)}}) copy-start(%p)
  %x = bf16[16,128]{VMEM} copy-done(%start)
  %y = bf16[16,128]{VMEM} add(%x, %x)
  %z = bf16[9,100]{TILES} slice(%y), slice={{[0:9], [0:100]}}
  %start.1 = (bf16[16,128]{TILES}, bf16[16,128]{VMEM}, u32[]{{:S(2)}}) copy-start(%y)
  %w = bf16[16,128]{TILES} copy-done(%start.1)
  ROOT %v = bf16[16,128]{TILES} multiply(%w, %p)
""")
    assert moved(text) == {
        "start": (SIZE, 0),
        "z": (0, SIZE),  # 9 x 100 in whole tiles
        "w": (0, SIZE),
        "v": (2 * SIZE, SIZE),
    }


def test_a_collective_that_other_work_carries_on_counts_once():
    """A gather of [16, 128] from four chips beside a product; kernels of Mosaic count theirs."""
    small = f"bf16[4,128]{TILES}"
    whole = f"bf16[16,128]{TILES}"
    flag = "u32[]{:S(2)}"
    text = entry(
        f"""
  %p = {small} parameter(0)
  %q = {whole} parameter(1)
  %room = {whole} custom-call(), custom_call_target="AllocateBuffer"
  %go = ({small}, {whole}, {flag}) fusion(%p), kind=kCustom, calls=%begin
  %a = {small} get-tuple-element(%go), index=0
  %b = {whole} get-tuple-element(%go), index=1
  %meanwhile = ({whole}, {small}, {whole}) fusion(%a, %b, %q), calls=%async_collective_fusion.1
  %c = {whole} get-tuple-element(%meanwhile), index=2
  %came = {whole} fusion(%a, %c), kind=kCustom, calls=%end
  ROOT %kernel = {whole} custom-call(%came, %came, %q), custom_call_target="tpu_custom_call"
""",
        f"""
%begin (p: bf16[4,128]) -> (bf16[4,128], bf16[16,128], u32[]) {{
  %p = {small} parameter(0)
  %all = {whole} all-gather(%p), dimensions={{0}}
  ROOT %go = ({small}, {whole}, {flag}) custom-call(%all), custom_call_target="AsyncCollectiveStart"
}}
%async_collective_fusion.1 (a: bf16[4,128]) -> bf16[16,128] {{
  %a = {small} parameter(0)
  %b = {whole} parameter(1)
  %q = {whole} parameter(2)
  %all = {whole} all-gather(%a), dimensions={{0}}
  %y = {whole} negate(%q)
  ROOT %t = ({whole}, {small}, {whole}) tuple(%y, %a, %all)
}}
%end (a: bf16[4,128], c: bf16[16,128]) -> bf16[16,128] {{
  %a = {small} parameter(0)
  %c = {whole} parameter(1)
  %all = {whole} all-gather(%a), dimensions={{0}}
  ROOT %came = {whole} custom-call(%a, %c, %all), custom_call_target="AsyncCollectiveDone"
}}""",
    )
    assert moved(text) == {
        "go": (8 * 128 * 2, SIZE),  # four rows take a tile of eight
        "meanwhile": (SIZE, SIZE),
        "kernel": (2 * SIZE, SIZE),
    }


def test_asynchronous_calls_move_what_they_call():
    """A scatter on another core, and a slice that is fetched meanwhile."""
    whole = f"bf16[64,128]{TILES}"
    row = f"bf16[16,128]{TILES}"
    text = entry(
        f"""
  %p = {whole} parameter(0)
  %x = {row} parameter(1)
  %far = (({whole}, {row}), {whole}) call-start(%p, %x), to_apply=%sums
  %near = (({whole}), {row}, u32[]) async-start(%p), calls=%part
  %y = {row} async-done(%near)
  %early = (({whole}), {row}, u32[]) slice-start(%p), slice={{[0:16], [0:128]}}
  %w = {row} slice-done(%early)
  ROOT %z = {whole} call-done(%far)
""",
        f"""
%sums (p: bf16[64,128], x: bf16[16,128]) -> bf16[64,128] {{
  %p.1 = {whole} parameter(0)
  %x.1 = {row} parameter(1)
  ROOT %added = {whole} scatter(%p.1, %i, %x.1), to_apply=%add
}}
%part (p: bf16[64,128]) -> bf16[16,128] {{
  %p.2 = {whole} parameter(0)
  ROOT %s = {row} slice(%p.2), slice={{[0:16], [0:128]}}
}}""",
    )
    assert moved(text) == {
        "added": (2 * SIZE, SIZE),
        "near": (SIZE, SIZE),
        "early": (SIZE, 0),
        "w": (0, SIZE),
    }


def test_a_ragged_exchange_fills_its_room_in_place():
    text = entry(f"""
  %p = bf16[16,128]{TILES} parameter(0)
  %room = bf16[64,128]{TILES} broadcast(%zero), dimensions={{}}
  %go = ((bf16[16,128]{TILES}), bf16[64,128]{TILES}) ragged-all-to-all-start(%p, %room, %i, %n)
  %came = bf16[64,128]{TILES} ragged-all-to-all-done(%go)
  ROOT %back = bf16[16,128]{TILES} ragged-all-to-all(%came, %p, %i, %n)
""")
    assert moved(text) == {"room": (0, 4 * SIZE), "go": (SIZE, SIZE), "back": (SIZE, SIZE)}


def test_updates_in_place_and_not():
    whole = f"bf16[64,128]{TILES}"
    row = f"bf16[16,128]{TILES}"
    text = entry(
        f"""
  %p = {whole} parameter(0)
  %x = {row} parameter(1)
  %here = {whole} fusion(%p, %x, %i), kind=kLoop, calls=%put
  %there = {whole} fusion(%x, %i), kind=kLoop, calls=%put_into_zeros
  %plain = {whole} dynamic-update-slice(%there, %x, %i, %i)
  ROOT %sums = {whole} scatter(%plain, %i, %x), to_apply=%add
""",
        f"""
%put (p: bf16[64,128], x: bf16[16,128], i: s32[]) -> bf16[64,128] {{
  %p.1 = {whole} parameter(0)
  %x.1 = {row} parameter(1)
  %i.1 = s32[] parameter(2)
  %twice = {row} add(%x.1, %x.1)
  ROOT %u = {whole} dynamic-update-slice(%p.1, %twice, %i.1, %i.1)
}}
%put_into_zeros (x: bf16[16,128], i: s32[]) -> bf16[64,128] {{
  %x.1 = {row} parameter(0)
  %i.1 = s32[] parameter(1)
  %zeros = {whole} broadcast(%z), dimensions={{}}
  ROOT %u = {whole} dynamic-update-slice(%zeros, %x.1, %i.1, %i.1)
}}""",
    )
    assert moved(text) == {
        "here": (SIZE, SIZE),
        "there": (SIZE, 4 * SIZE),
        "plain": (SIZE, SIZE),
        "sums": (2 * SIZE, SIZE),  # read what is there, and what is added
    }


def test_a_slice_after_work_element_by_element():
    """Only the elements of the slice are converted; a sum of all reads all."""
    whole = f"bf16[64,128]{TILES}"
    row = f"bf16[16,128]{TILES}"
    text = entry(
        f"""
  %p = {whole} parameter(0)
  %part = {row} fusion(%p), kind=kLoop, calls=%slice_of_product
  ROOT %both = ({row}, bf16[128]{{0:T(256)}}) fusion(%p), kind=kLoop, calls=%slice_and_sum
""",
        f"""
%slice_of_product (p: bf16[64,128]) -> bf16[16,128] {{
  %p.1 = {whole} parameter(0)
  %square = {whole} multiply(%p.1, %p.1)
  ROOT %s = {row} slice(%square), slice={{[0:16], [0:128]}}
}}
%slice_and_sum (p: bf16[64,128]) -> (bf16[16,128], bf16[128]) {{
  %p.2 = {whole} parameter(0)
  %s.1 = {row} slice(%p.2), slice={{[0:16], [0:128]}}
  %sum = bf16[128]{{0:T(256)}} reduce(%p.2, %zero), dimensions={{0}}, to_apply=%add
  ROOT %t = ({row}, bf16[128]{{0:T(256)}}) tuple(%s.1, %sum)
}}""",
    )
    assert moved(text) == {"part": (SIZE, SIZE), "both": (4 * SIZE, SIZE + 2 * 256)}


def test_scopes():
    """Its own; that inside of a fusion, of the user, of the operand, of the loop around it."""
    x = f"bf16[16,128]{TILES}"

    def name(path):
        return f'metadata={{op_name="jit(train_step)/{path}"}}'

    text = entry(
        f"""
  %p = {x} parameter(0)
  %own = {x} negate(%p), {name("jvp()/while/body/dispatch/shard_map/experts/neg")}
  %inside = {x} fusion(%own), calls=%fused, {name("while/body/dynamic_update_slice")}
  %for_user = {x} copy(%inside)
  %user = {x} negate(%for_user), {name("transpose(jvp(head))/neg")}
  %of_operand = {x} copy(%user)
  %again = {x} negate(%p), {name("while/body/add_up/add")}
  %loop = ({x}) while(%c), condition=%until, body=%body, {name("attention/dot_general")}
  ROOT %t = ({x}, {x}) tuple(%of_operand, %again)
""",
        f"""
%body (c: (bf16[16,128])) -> (bf16[16,128]) {{
  %c = ({x}) parameter(0)
  %g = {x} get-tuple-element(%c), index=0
  %in_loop = {x} copy(%g)
  ROOT %t = ({x}) tuple(%in_loop)
}}
%until (c: (bf16[16,128])) -> pred[] {{
  %c = ({x}) parameter(0)
  ROOT %go = pred[] compare(%c, %c), direction=LT
}}
%fused (p: bf16[16,128]) -> bf16[16,128] {{
  %p.1 = {x} parameter(0), {name("router/add")}
  %y = {x} add(%p.1, %p.1), {name("attention/add")}
  ROOT %z = {x} add(%y, %p.1), {name("while/body/add")}
}}""",
    )
    found = {m.name: m.scope for m in moves(text)}
    assert found == {
        "own": "experts",
        "inside": "attention",
        "for_user": "head",
        "user": "head",
        "of_operand": "head",
        "in_loop": "attention",
        "again": "optimizer",
    }
    by_scope = memory_traffic.by_scope(moves(text))
    assert tuple(by_scope) == memory_traffic.ALL_SCOPES
    assert by_scope["head"] == pytest.approx(3 * 2 * SIZE / 1e9)
    assert by_scope["other"] == 0
