"""Experts of whole numbers: every backend, the layer and a mesh against numpy.

Shapes: N rows, T tokens, D hidden, F expert width, E experts, K activated per token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import DispatchConfig, MoEConfig, QuantisedConfig, RouterConfig
from dsmoe_jax.model import mup
from dsmoe_jax.moe import experts, kernels
from dsmoe_jax.moe.experts import BACKENDS, ExpertWeights, check_backend, choose_backend
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routed import routed_experts
from dsmoe_jax.moe.types import MoEInputs, RouterInputs, Routing
from dsmoe_jax.nn.quantisation import Quantised, quantise
from tests.tools.rounding import ROUNDING

D, F, E, K = 8, 8, 8, 3
T = 48
SIZES = [5, 0, 9, 3]
SERVING = sorted(name for name, backend in BACKENDS.items() if backend.quantised)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def rounded(x):
    """Rows as numbers of 8 bits, times their scales."""
    scale = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    return np.rint(x / np.where(scale > 0, scale, 1)) * np.float64(scale)


def expert(x_ND, gate, up, down, activations=False):
    """One expert with dequantised matrices, float64, whose inputs are of 8 bits or not."""
    seen = rounded if activations else np.float64
    # What is rounded to 8 bits is float32: a number near a half would else go the other way.
    hidden_NF = silu(seen(x_ND) @ gate.T) * (seen(x_ND) @ up.T)
    return seen(np.float32(hidden_NF)) @ down.T


def whole_numbers(w_EOI, activations=False):
    found = quantise(jnp.asarray(w_EOI))
    return Quantised(found.values, found.scale, activations)


def plain(w):
    """A quantised matrix in numpy."""
    return np.asarray(w.values, np.float64) * np.asarray(w.scale, np.float64)[..., None]


def weights(activations=False, e=4):
    return ExpertWeights(
        *(
            whole_numbers(normal(*shape, seed=i), activations)
            for i, shape in enumerate([(e, F, D), (e, F, D), (e, D, F)])
        )
    )


@functools.cache
def rows(backend, activations, weighted=False):
    """Rows and their results; padding is NaN, or zeros where a backend may see it."""
    n = sum(SIZES) + 4
    x_ND = normal(n, D, seed=9)
    x_ND[sum(SIZES) :] = 0 if weighted else np.nan
    sizes_E = jnp.asarray(SIZES, jnp.int32)
    w = weights(activations)
    if not weighted:
        return x_ND, jax.jit(BACKENDS[backend].run)(x_ND, sizes_E, w)
    run = jax.jit(BACKENDS[backend].run_weighted)
    return x_ND, run(x_ND, jnp.full(n, 0.5), sizes_E, experts.join(w))


def in_numpy(x_ND, activations):
    matrices = [plain(w) for w in weights()[:3]]
    ends = np.cumsum(SIZES)
    parts = [
        expert(x_ND[end - size : end], *(m[e] for m in matrices), activations)
        for e, (end, size) in enumerate(zip(ends, SIZES, strict=True))
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("backend", SERVING)
def test_a_backend_is_the_formula(backend, activations):
    x_ND, found_ND = rows(backend, activations)
    wanted_ND = in_numpy(x_ND, activations)
    np.testing.assert_allclose(found_ND[: sum(SIZES)], wanted_ND, rtol=1e-5, atol=2e-5)
    assert (np.asarray(found_ND[sum(SIZES) :]) == 0).all()


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("backend", ["ragged_dot", "loop"])
def test_gates_and_joined_weights(backend, activations):
    """A gate before the rounding of a row multiplies its scale."""
    x_ND, found_ND = rows(backend, activations, weighted=True)
    wanted_ND = 0.5 * in_numpy(x_ND, activations)
    np.testing.assert_allclose(found_ND[: sum(SIZES)], wanted_ND, rtol=1e-5, atol=2e-5)


def test_joined_and_split():
    w = weights(activations=True)
    again = experts.split(experts.join(w))
    for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(w) == jax.tree.structure(again)


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - set(SERVING)))
def test_other_backends_refuse(name):
    with pytest.raises(ValueError, match=rf"{name}'.*no quantised experts.*'blocked'"):
        check_backend(name, quantised=True)


def test_the_backend_of_choice_serves_them():
    assert choose_backend("auto", jnp.dtype("float32"), quantised=True).quantised


CONFIG = MoEConfig(
    4, 2, num_experts_per_tok=2, moe_intermediate_size=F, quantised=QuantisedConfig(),
    expert_backend="loop",
)  # fmt: skip


@nnx.jit(static_argnums=0)
def make_layer(moe):
    return MoELayer(moe, hidden_size=D, vocab_size=9, initializer_range=0.4, rngs=nnx.Rngs(0))


def test_the_layer_is_the_formula():
    """Shared experts, too; the router is as it was."""
    layer = make_layer(CONFIG)
    x_BSD = normal(2, 6, D)
    valid_BS = jnp.ones((2, 6), bool)
    inputs = MoEInputs(valid_BS.astype(jnp.int32), valid_BS)
    y_BSD, report = nnx.jit(lambda layer, x_BSD: layer(x_BSD, inputs))(layer, x_BSD)
    gate, up, down = (plain(w) for w in layer.expert_weights()[:3])
    shared = layer.shared
    of_shared = [
        np.asarray(values[...], np.float64) * np.asarray(scale[...], np.float64)[:, None]
        for values, scale in (
            (shared.gate_FD, shared.gate_scale_F),
            (shared.up_FD, shared.up_scale_F),
            (shared.down_DF, shared.down_scale_D),
        )
    ]
    wanted_BSD = expert(x_BSD, *of_shared)
    recorded = jax.device_get(report.recorded)
    for b, s in np.ndindex(2, 6):
        for i, g in zip(recorded.ids[b, s], recorded.gates[b, s], strict=True):
            wanted_BSD[b, s] += g * expert(x_BSD[b, s], gate[i], up[i], down[i])
    np.testing.assert_allclose(y_BSD, wanted_BSD, rtol=1e-5, atol=1e-5)
    assert layer.gate_EFD[...].dtype == layer.shared.down_DF[...].dtype == jnp.int8
    assert layer.router_ED[...].dtype == jnp.float32


def test_mup_multiplies_the_scales():
    """Layers that were never trained have the same whole numbers with smaller scales."""
    (_, plain), (graph, state) = (nnx.split(make_layer(CONFIG)) for _ in range(2))
    layer = nnx.merge(graph, state)
    mup.scale_initial(layer, 4.0)
    wider = nnx.split(layer)[1]
    np.testing.assert_array_equal(wider["gate_EFD"][...], plain["gate_EFD"][...])
    np.testing.assert_array_equal(wider["gate_scale_EF"][...], plain["gate_scale_EF"][...] / 2)
    down = "shared", "down_scale_D"
    np.testing.assert_array_equal(wider[down[0]][down[1]][...], plain[down[0]][down[1]][...] / 2)


def test_gates_are_rounded_to_bfloat16():
    layer = make_layer(CONFIG)
    x_TD = normal(5, D)
    inputs = RouterInputs(jnp.zeros(5, jnp.int32), jnp.ones(5, bool))
    route = nnx.jit(lambda layer: layer.route(jnp.asarray(x_TD), inputs)[0])
    plain = route(layer)
    layer.config = dataclasses.replace(CONFIG, router=RouterConfig(gates_dtype="bfloat16"))
    rounded = route(layer)
    np.testing.assert_array_equal(plain.ids_TK, rounded.ids_TK)
    assert rounded.gates_TK.dtype == jnp.float32
    np.testing.assert_array_equal(rounded.gates_TK, plain.gates_TK.astype(jnp.bfloat16))
    assert (rounded.gates_TK != plain.gates_TK).any()


@functools.cache
def tokens():
    rng = np.random.default_rng(1)
    ids_TK = np.stack([rng.choice(E, K, replace=False) for _ in range(T)]).astype(np.int32)
    return normal(T, D, seed=5), ids_TK, np.abs(normal(T, K, seed=6))


def on_mesh(sizes, name, backend, activations=False):
    x_TD, ids_TK, gates_TK = tokens()
    moe = MoEConfig(
        E, 0, num_experts_per_tok=K, moe_intermediate_size=F, dispatch=DispatchConfig(name),
        expert_backend=backend, quantised=QuantisedConfig(activations=activations),
    )  # fmt: skip
    axes = ("data", "fsdp", "expert", "tensor")
    mesh = jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    w = jax.device_get(weights(activations, E))
    with jax.set_mesh(mesh):

        @jax.jit
        def run(x_TD, ids_TK, gates_TK, w):
            routing = Routing(ids_TK, gates_TK, None)
            return routed_experts(x_TD, routing, w, moe, kernels.JAX_ROWS)[0]

        return np.asarray(run(x_TD, ids_TK, gates_TK, w))


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("sizes", "name", "backend"),
    [((1, 2, 2, 2), "all_to_all", "ragged_dot"), ((2, 1, 4, 1), "all_gather", "blocked")],
)
def test_on_a_mesh(sizes, name, backend):
    """Scales are split as the outputs that they belong to."""
    x_TD, ids_TK, gates_TK = tokens()
    gate, up, down = (plain(w) for w in weights(e=E)[:3])
    wanted_TD = np.zeros((T, D))
    for t, k in np.ndindex(T, K):
        i = ids_TK[t, k]
        wanted_TD[t] += gates_TK[t, k] * expert(x_TD[t], gate[i], up[i], down[i])
    found_TD = on_mesh(sizes, name, backend)
    scale = np.abs(wanted_TD).max()
    np.testing.assert_allclose(found_TD, wanted_TD, rtol=1e-4, atol=200 * ROUNDING * scale)


@pytest.mark.eight_devices
def test_a_row_with_one_scale_is_not_split():
    with pytest.raises(ValueError, match=r"^mesh.tensor=2: splits a row .*activations False"):
        on_mesh((1, 2, 2, 2), "all_to_all", "ragged_dot", activations=True)
