"""Every expert backend against `loop`, values and all gradients, and `loop` against numpy."""

import importlib.util

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import ExpertConfig
from dsmoe_jax.moe import experts, kernels
from dsmoe_jax.moe.experts import BACKENDS, ExpertWeights, check_backend, choose_backend
from dsmoe_jax.moe.kernels import blocked, native
from dsmoe_jax.nn.feed_forward import form_of
from tests.tools.rounding import ROUNDING, Bounded

FAST_BACKENDS = sorted(set(BACKENDS) - {"loop"})

# What others' kernels got wrong: fill values, empty groups, sizes off the tile. All loads but the
# last share one shape, so each backend compiles once for them.
LOADS = {
    "full and off the tile": ([25, 37, 1, 38], 101),
    "on the tile": ([16, 32, 8, 40], 101),
    "empty experts": ([0, 59, 0, 42], 101),
    "one takes all": ([0, 0, 101, 0], 101),
    "one takes most, trailing padding": ([2, 3, 70, 1], 101),
    "nothing at all": ([0, 0, 0, 0], 101),
    "fewer rows than experts": ([1, 0, 1, 0], 3),
}


FORMS = {
    "swiglu": ExpertConfig(),
    "clamped_swiglu": ExpertConfig("clamped_swiglu", limit=0.7),
    "gpt_oss": ExpertConfig("gpt_oss", limit=0.9),
}
OTHER_FORMS = sorted(set(FORMS) - {"swiglu"})


def activation_of(form):
    return form_of(FORMS[form]).activation


def run_experts(rows_ND, sizes_E, weights, backend):
    return BACKENDS[backend].run(rows_ND, sizes_E, weights)


def make(sizes, n_rows, hidden=6, width=5, dtype=jnp.float32, seed=0):
    """Rows (NaN after the last group), sizes, weights and a cotangent (NaN there too)."""
    rng = np.random.default_rng(seed)

    def array(*shape, end=None):
        values = rng.standard_normal(shape)
        if end is not None:
            values[end:] = np.nan
        return jnp.asarray(values, dtype)

    rows_ND, dy_ND = (array(n_rows, hidden, end=sum(sizes)) for _ in range(2))
    e = len(sizes)
    weights = ExpertWeights(
        array(e, width, hidden), array(e, width, hidden), array(e, hidden, width)
    )
    return rows_ND, jnp.asarray(sizes, jnp.int32), weights, dy_ND


@jax.jit(static_argnames=("backend", "form"))
def value_and_gradients(rows_ND, sizes_E, weights, dy_ND, backend, form="swiglu"):
    def run(x_ND, w):
        return BACKENDS[backend].run(x_ND, sizes_E, w, activation_of(form))

    y_ND, transpose = jax.vjp(run, rows_ND, weights)
    return y_ND, transpose(dy_ND)


def assert_close(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
        )


def numpy_experts(rows_ND, sizes, weights):
    out_ND, start = np.zeros_like(rows_ND), 0
    for size, gate_FD, up_FD, down_DF in zip(sizes, *weights[:3], strict=True):
        x_ND = rows_ND[start : start + size]
        gate_NF = x_ND @ gate_FD.T
        hidden_NF = gate_NF / (1 + np.exp(-gate_NF)) * (x_ND @ up_FD.T)
        out_ND[start : start + size] = hidden_NF @ down_DF.T
        start += size
    return out_ND


@pytest.mark.parametrize("loads", LOADS)
def test_loop_is_the_formula(loads):
    sizes, n_rows = LOADS[loads]
    rows_ND, sizes_E, weights, dy_ND = make(sizes, n_rows)
    found_ND, _ = value_and_gradients(rows_ND, sizes_E, weights, dy_ND, "loop")
    expected_ND = numpy_experts(np.asarray(rows_ND), sizes, [np.asarray(w) for w in weights[:3]])
    np.testing.assert_allclose(found_ND, expected_ND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_equals_the_loop(backend, loads):
    args = make(*LOADS[loads])
    assert_close(value_and_gradients(*args, backend), value_and_gradients(*args, "loop"), 5e-5)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_padding_is_exactly_zero_and_harmless(backend):
    sizes, n_rows = LOADS["one takes most, trailing padding"]
    args = make(sizes, n_rows)
    y_ND, (dx_ND, d_weights) = value_and_gradients(*args, backend)
    assert (y_ND[sum(sizes) :] == 0).all()
    assert (dx_ND[sum(sizes) :] == 0).all()
    assert all(jnp.isfinite(d).all() for d in jax.tree.leaves(d_weights))


def careless(x_NI, w_EOI, sizes_E):
    """A grouped product that multiplies padding too and adds NaN to what comes of it."""
    owner_N = experts.expert_of_row(sizes_E, len(x_NI))
    y_NO = jnp.einsum("ni,noi->no", x_NI, w_EOI[jnp.minimum(owner_N, len(sizes_E) - 1)])
    return y_NO + jnp.where(owner_N < len(sizes_E), 0, jnp.nan)[:, None]


def test_grouped_products_survive_a_careless_kernel():
    # XLA on CPU fills padding with zeros; kernels elsewhere compute with it or leave NaN there.
    sizes, n_rows = LOADS["one takes most, trailing padding"]
    rows_ND, sizes_E, weights, dy_ND = make(sizes, n_rows)

    @jax.jit
    def found(rows_ND, weights, dy_ND):
        def run(x_ND, w):
            return experts._grouped(careless, x_ND, sizes_E, w)

        y_ND, transpose = jax.vjp(run, rows_ND, weights)
        return y_ND, transpose(dy_ND)

    expected = value_and_gradients(rows_ND, sizes_E, weights, dy_ND, "loop")
    assert_close(found(rows_ND, weights, dy_ND), expected, 2e-5)


careless_weighted = experts.Backend(None, product=careless).run_weighted


@jax.jit(static_argnames=("backend", "form"))
def weighted(rows_ND, gates_N, sizes_E, weights, dy_ND, backend, form="swiglu"):
    """Values and gradients with gates and joined weights, in the groups; backend None: the loop's
    results times the gates."""
    activation = activation_of(form)

    def run(x_ND, gates_N, weights):
        if backend is None:
            return gates_N[:, None] * BACKENDS["loop"].run(x_ND, sizes_E, weights, activation)
        run = BACKENDS[backend].run_weighted if backend in BACKENDS else careless_weighted
        return run(x_ND, gates_N, sizes_E, experts.join(weights), activation)

    y_ND, transpose = jax.vjp(run, rows_ND, gates_N, weights)
    dx_ND, dgates_N, dweights = transpose(dy_ND)
    rows = jnp.concatenate([y_ND, dx_ND, dgates_N[:, None]], axis=1)
    return jnp.where((jnp.arange(len(rows)) < sizes_E.sum())[:, None], rows, 0), dweights


def gates_of(rows_ND):
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 2, len(rows_ND)), jnp.float32)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("backend", [*sorted(BACKENDS), "careless"])
def test_weights_of_results_inside_are_those_outside(backend, loads):
    rows_ND, sizes_E, weights, dy_ND = jax.tree.map(np.nan_to_num, make(*LOADS[loads]))
    args = rows_ND, gates_of(rows_ND), sizes_E, weights, dy_ND
    assert_close(weighted(*args, backend), weighted(*args, None), 5e-5)


def of_form(name, loads):
    """The arguments of `make` with biases where the form has them, and its activation."""
    rows_ND, sizes_E, weights, dy_ND = make(*LOADS[loads])
    form = form_of(FORMS[name])
    if form.biases:
        e, f, d = weights.gate_EFD.shape
        rng = np.random.default_rng(2)
        shapes = {"gate_bias_EF": (e, f), "up_bias_EF": (e, f), "down_bias_ED": (e, d)}
        biases = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
        weights = weights._replace(**biases)
    return rows_ND, sizes_E, weights, dy_ND


@pytest.mark.parametrize(
    ("backend", "form"),
    [
        *((n, "gpt_oss") for n in FAST_BACKENDS if not BACKENDS[n].only_swiglu),
        ("ragged_dot", "clamped_swiglu"),
    ],
)
def test_every_form_of_expert(backend, form):
    """Values and gradients are those of the loop; padding of NaN stays out of every bias."""
    for loads in ("one takes most, trailing padding", "empty experts"):
        args = of_form(form, loads)
        found, expected = (value_and_gradients(*args, name, form) for name in (backend, "loop"))
        assert_close(found, expected, 5e-5)


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("backend", ["loop", "ragged_dot", "careless"])
def test_weights_of_results_of_every_form(backend, form):
    """A gate weighs all of an expert's output, its bias too."""
    loads = "one takes most, trailing padding"
    rows_ND, sizes_E, weights, dy_ND = jax.tree.map(np.nan_to_num, of_form(form, loads))
    args = rows_ND, gates_of(rows_ND), sizes_E, weights, dy_ND
    assert_close(weighted(*args, backend, form), weighted(*args, None, form), 5e-5)


def test_the_written_gradient_is_that_of_the_function():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=50), jnp.float32) for _ in range(3)]

    @jax.jit(static_argnums=0)
    def both(form, g, u, dhidden):
        activation = activation_of(form)
        _, transpose = jax.vjp(activation.hidden, g, u)
        return activation.gradient(g, u, dhidden), transpose(dhidden)

    for form in FORMS:
        assert_close(*both(form, *arrays), 1e-6)


def test_the_compiled_backend_refuses_other_forms():
    form = form_of(FORMS["clamped_swiglu"])
    with pytest.raises(ValueError, match=r"expert_backend='native': computes SwiGLU.*'blocked'"):
        check_backend("native", form)
    assert choose_backend("auto", jnp.dtype("float32"), form) is BACKENDS["blocked"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "geglu"}, r"expert\.name='geglu': must be one of \['clamped_swiglu', 'gpt_oss'"),
        ({"limit": 3.0}, r"expert\.limit=3\.0: the swiglu experts do not have it; must be None"),
        ({"name": "clamped_swiglu", "alpha": 2.0}, r"expert\.alpha=2\.0: .*one of \['gpt_oss'\]"),
        ({"name": "gpt_oss", "limit": -1.0}, r"expert\.limit=-1\.0: must be > 0"),
    ],
)
def test_impossible_forms(section, message):
    with pytest.raises(ValueError, match=message):
        form_of(ExpertConfig(**section))


@hypothesis.settings(max_examples=30, derandomize=True)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 25), min_size=4, max_size=4), seed=st.integers(0, 9)
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_equals_the_loop_for_any_load(backend, sizes, seed):
    args = make(sizes, 101, seed=seed)
    assert_close(value_and_gradients(*args, backend), value_and_gradients(*args, "loop"), 5e-5)


@pytest.mark.parametrize("backend", sorted(set(FAST_BACKENDS) - {"native"}))
def test_bfloat16_is_close_and_accumulates_in_float32(backend):
    # 300 rows for one of 20 experts: `blocked` must add up several windows in float32.
    sizes, n_rows, hidden, width = [0, 300, 5] + [0] * 17, 310, 64, 48
    wide = make(sizes, n_rows, hidden, width)
    wide = (wide[0] / 4, wide[1], jax.tree.map(lambda w: w / 8, wide[2]), wide[3] / 4)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, wide)
    exact = value_and_gradients(
        *jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, narrow),
        "loop",
    )
    found = value_and_gradients(*narrow, backend)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.bfloat16
        error = jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()
        assert error < 0.015, "more than a few roundings to bfloat16 (2**-8 each)"


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backend_in_a_checkpointed_scan_over_layers(backend):
    rows_ND, sizes_E, weights, dy_ND = make([3, 0, 20, 1], 24)
    layers = jax.tree.map(lambda w: jnp.stack([w, w[::-1] / 2]), weights)

    @jax.jit(static_argnames="backend")
    def gradients(layers, rows_ND, backend):
        def layer(x_ND, w):
            return x_ND + run_experts(x_ND, sizes_E, ExpertWeights(*w), backend) / 4, None

        def loss(layers, rows_ND):
            return (jax.lax.scan(jax.checkpoint(layer), rows_ND, layers)[0] * dy_ND).sum()

        return jax.grad(loss, argnums=(0, 1))(layers, rows_ND)

    assert_close(gradients(layers, rows_ND, backend), gradients(layers, rows_ND, "loop"), 1e-4)


@pytest.mark.parametrize("backend", ["blocked", "native"])
def test_same_bits_twice(backend):
    args = make([40, 0, 13, 43], 101)
    first, second = (value_and_gradients(*args, backend) for _ in range(2))
    assert all(
        (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        if not np.isnan(a).any()
    )


@pytest.mark.parametrize(
    ("n_rows", "n_experts"), [(7168, 63), (28672, 63), (3, 4), (64, 16), (9, 1)]
)
def test_window_heights_are_a_short_ladder(n_rows, n_experts):
    heights = blocked.window_heights(n_rows, n_experts)
    assert heights == sorted(set(heights))
    assert heights[-1] <= n_rows
    assert len(heights) <= 20


@pytest.mark.parametrize(
    ("sizes", "hidden", "width"),
    [([300, 0, 7, 250, 1], 300, 37), ([24, 25, 47, 49, 8], 40, 261), ([513, 0, 0, 0, 0], 33, 9)],
)
def test_native_off_every_tile(sizes, hidden, width):
    # Its blocks: 240 rows, 24 columns, 8 rows of a weight, 256 of a sum.
    rows_ND, sizes_E, weights, dy_ND = make(sizes, sum(sizes) + 3, hidden, width)
    weights = jax.tree.map(lambda w: w / 16, weights)
    args = rows_ND, sizes_E, weights, dy_ND
    assert_close(value_and_gradients(*args, "native"), value_and_gradients(*args, "loop"), 1e-4)


def sigmoid(x):
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, 1.0) / (1.0 + small)


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    return sigmoid(x) + silu(x) * sigmoid(-x)


def silu_bend(x):
    return sigmoid(x) * sigmoid(-x) * (2 + x * (sigmoid(-x) - sigmoid(x)))


def bounded_silu(gate: Bounded) -> tuple[Bounded, Bounded]:
    """SiLU and its slope, from sigmoids in float32."""
    x = gate.value
    own = 8 * ROUNDING  # an exponential to 1e-7, a sum, a quotient, products
    least = 1e-38 * np.abs(x)  # an exponential may stop short of infinity
    # 1 - sigmoid errs by a rounding of 1, until it is 0.
    late = own * sigmoid(x) * np.minimum(1 + np.abs(x), 20)
    value = gate.through(silu, silu_slope, own * np.abs(silu(x)) + least)
    slope = gate.through(silu_slope, silu_bend, own * np.abs(silu_slope(x)) + late + least)
    return value, slope


@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (6, 5)])  # alone, and in sums
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_silu_at_the_extremes(backend, hidden, width):
    """Values and gradients of rows from 1e-6 to 1e6, within what float32 may round."""
    rows_ND, sizes_E, weights, dy_ND = make([20, 0, 80, 0], 101, hidden, width)  # as in LOADS
    scale_N = np.float32(10.0) ** (6 * np.linspace(-1, 1, 20) ** 3)  # most of them near 1
    rows_ND = rows_ND * np.append(np.tile(scale_N, 5), 1).astype(np.float32)[:, None]
    y_ND, (dx_ND, _) = value_and_gradients(rows_ND, sizes_E, weights, dy_ND, backend)
    for expert, rows in ((0, slice(0, 20)), (2, slice(20, 100))):
        gate_FD, up_FD, down_DF = (np.asarray(w[expert], np.float64) for w in weights[:3])
        x_ND, dy = Bounded.exact(rows_ND[rows]), Bounded.exact(dy_ND[rows])
        silu_NF, slope_NF = bounded_silu(x_ND @ gate_FD.T)
        up_NF, dhidden_NF = x_ND @ up_FD.T, dy @ down_DF
        (silu_NF * up_NF @ down_DF.T).assert_holds(y_ND[rows])
        dgate_NF = dhidden_NF * up_NF * slope_NF
        (dgate_NF @ gate_FD + dhidden_NF * silu_NF @ up_FD).assert_holds(dx_ND[rows])


def test_native_lets_nan_through():
    rows_ND, sizes_E, weights, _ = make([5, 20], 25)
    y_ND = run_experts(rows_ND.at[3, 2].set(jnp.nan), sizes_E, weights, "native")
    assert jnp.isnan(y_ND[3]).all()
    assert jnp.isfinite(y_ND[4:]).all()


def test_native_refuses_bfloat16():
    args = make([5, 20], 25, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"'native': computes in float32, not bfloat16"):
        run_experts(*args[:3], "native")


def test_without_a_compiler_native_is_refused_and_auto_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    with pytest.raises(ValueError, match=r"'native': no C\+\+ compiler .* or choose 'blocked'"):
        check_backend("native")
    native.is_there.cache_clear()
    try:
        args = make([5, 20], 25)
        auto = choose_backend("auto", jnp.dtype("float32")).run
        assert auto is BACKENDS["blocked"].run
        assert_close(auto(*args[:3]), run_experts(*args[:3], "loop"), 2e-5)
    finally:
        native.is_there.cache_clear()
    assert "'blocked' (no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_told_in_one_line(monkeypatch, tmp_path):
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\necho 'cc: error: no such flag' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(native.NotBuilt, match="does not compile the kernels: cc: error: no such f"):
        native.library.__wrapped__()


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"expert_backend='blokced': must be one of .*'blocked'"):
        check_backend("blokced")


def test_missing_tokamax_is_refused_in_one_sentence(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        experts, "find_spec", lambda name, *a: None if name == "tokamax" else real(name, *a)
    )
    with pytest.raises(ValueError, match="tokamax library is not installed"):
        check_backend("tokamax")


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "native"), ("bfloat16", "blocked")])
def test_auto_is_the_compiled_backend_where_it_serves(dtype, expected):
    assert choose_backend("auto", jnp.dtype(dtype)) is BACKENDS[expected]


def test_row_kernels_do_not_depend_on_the_backend():
    """One question, asked of the dtype and the devices; a name is taken at its word or refused."""
    float32, bfloat16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    assert kernels.choose_rows("auto", float32) is kernels.ROW_KERNELS["native"]
    assert kernels.choose_rows("auto", bfloat16) is kernels.JAX_ROWS
    assert kernels.choose_rows("jax", float32) is kernels.JAX_ROWS
    with pytest.raises(ValueError, match=r"row_kernels='native': compiled for one CPU device in"):
        kernels.choose_rows("native", bfloat16)
    with pytest.raises(ValueError, match=r"row_kernels='nativ': must be one of .*'native'"):
        kernels.choose_rows("nativ", float32)
