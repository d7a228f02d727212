"""The whole layer: every router x dispatch x backend against one dense loop over the experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import Config, replace
from dsmoe_jax.moe import dispatch, experts
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routers import ROUTERS
from dsmoe_jax.moe.types import RouterInputs, Routing


def layer_config(e=6, k=2, shared=1, d=8, f=12, **moe):
    moe = {"n_routed_experts": e, "num_experts_per_tok": k, "n_shared_experts": shared,
           "moe_intermediate_size": f, **moe}  # fmt: skip
    overrides = {f"model.moe.{key}": value for key, value in moe.items()}
    return replace(
        Config(), **{"model.hidden_size": d, "model.initializer_range": 0.4, **overrides}
    ).model


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T


def dense_loop(layer, x_TD, token_ids_T):
    """Every expert on every token, weighted by a dense T x E gate matrix: no dispatch at all."""
    routing = layer.route(x_TD, RouterInputs(token_ids_T))
    y_TD = jnp.zeros_like(x_TD)
    for i in range(layer.config.n_routed_experts):
        gate_T = jnp.where(routing.ids_TK == i, routing.gates_TK, 0).sum(axis=1)
        y_i = swiglu(x_TD, layer.gate_EFD[i], layer.up_EFD[i], layer.down_EDF[i])
        y_TD = y_TD + gate_T[:, None] * y_i
    if layer.config.n_shared_experts:
        shared = layer.shared
        y_TD = y_TD + swiglu(x_TD, shared.gate_FD[...], shared.up_FD[...], shared.down_DF[...])
    return y_TD


def value_and_gradients(layer, x_BSD, token_ids_BS, apply):
    """The output, and gradients to the input and all parameters of a fixed projection of it."""
    graph, params = nnx.split(layer)
    probe = jax.random.normal(jax.random.key(7), x_BSD.shape)

    def loss(params, x_BSD):
        y_BSD = apply(nnx.merge(graph, params), x_BSD, token_ids_BS)
        return (y_BSD * probe).sum(), y_BSD

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y_BSD), grads = step(params, x_BSD)
    return y_BSD, grads


def run_layer(layer, x_BSD, token_ids_BS):
    return layer(x_BSD, token_ids_BS, jnp.ones(token_ids_BS.shape, bool))[0]


def run_oracle(layer, x_BSD, token_ids_BS):
    y_TD = dense_loop(layer, x_BSD.reshape(-1, x_BSD.shape[-1]), token_ids_BS.reshape(-1))
    return y_TD.reshape(x_BSD.shape)


# Every backend with a router of each kind of routing (K chosen, one fixed, "nobody" among the
# chosen); every other router with the quickest backend.  Replay needs a recording, see
# tests/training/test_recording.py.
COMBINATIONS = [(r, b) for r in ("topk_softmax", "hash", "expert_choice") for b in experts.BACKENDS]
COMBINATIONS += [
    (r, "loop") for r in ROUTERS if (r, "loop") not in COMBINATIONS and not r.startswith("replay")
]


@pytest.mark.parametrize(("router", "backend"), COMBINATIONS)
def test_agrees_with_the_dense_loop(router, backend):
    """On one device; dispatch between devices has its own tests."""
    if backend == "tokamax":
        pytest.importorskip("tokamax")
    config = layer_config(
        k=ROUTERS[router].top or 3, router=router, expert_backend=backend,
        expert_balance_factor=0.0 if ROUTERS[router].balanced else 0.01,
    )  # fmt: skip
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 50)
    got = value_and_gradients(layer, x, tokens, run_layer)
    want = value_and_gradients(layer, x, tokens, run_oracle)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5), got, want)
    if ROUTERS[router].learned and router != "reinforce":  # that one learns from the loss alone
        assert jnp.abs(got[1][0].router_ED[...]).max() > 1e-3


def by_dispatch(x, gates, ids, n_experts):
    """Local dispatch to experts that multiply by their number: any misplaced row shows."""

    def run(rows, sizes):
        factor = jnp.repeat(jnp.arange(1.0, n_experts + 1), sizes, total_repeat_length=len(rows))
        return rows * factor[:, None]

    return dispatch.local(x, Routing(ids, gates, None), n_experts, run)[0]


def by_formula(x, gates, ids, n_experts):
    del n_experts
    return (gates * (ids + 1.0)).sum(axis=1)[:, None] * x


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_pullback(apply, x, gates, ids, n_experts):
    y, pull = jax.vjp(lambda x, gates: apply(x, gates, ids, n_experts), x, gates)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))


@settings(max_examples=30, deadline=None)
@given(sizes=st.sampled_from([(1, 1, 1), (7, 4, 2), (5, 3, 3)]), data=st.data())
def test_local_dispatch_for_any_routing(sizes, data):
    """Any ids at all, empty experts and one expert taking all among them; with gradients."""
    t, e, k = sizes
    ids = np.array([data.draw(st.permutations(range(e)))[:k] for _ in range(t)], np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x, gates = (rng.normal(size=shape).astype(np.float32) for shape in ((t, 4), (t, k)))
    got = value_and_pullback(by_dispatch, x, gates, ids, e)
    want = value_and_pullback(by_formula, x, gates, ids, e)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_shared_experts_are_one_wide_ffn():
    """Two shared experts of width f are the sum of two FFNs cut out of the wide one."""
    layer = MoELayer(layer_config(e=0, k=0, shared=2, f=12), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    y, stats = layer(x, jnp.zeros((1, 5), jnp.int32), jnp.ones((1, 5), bool))
    assert stats is None
    gate, up, down = (layer.shared.gate_FD[...], layer.shared.up_FD[...], layer.shared.down_DF[...])
    halves = [swiglu(x, gate[s], up[s], down[:, s]) for s in (slice(0, 12), slice(12, 24))]
    np.testing.assert_allclose(y, sum(halves), atol=1e-5)


def test_router_is_float32_even_when_activations_are_bfloat16():
    layer = MoELayer(layer_config(), rngs=nnx.Rngs(0))
    inputs = RouterInputs(jnp.zeros(3, jnp.int32))
    routing = layer.route(jnp.ones((3, 8), jnp.bfloat16), inputs)
    assert (
        routing.logits_TE.dtype
        == routing.gates_TK.dtype
        == routing.affinity_TE.dtype
        == jnp.float32
    )


def test_jitter_is_for_training_only():
    """The router's input is scaled by U(1 - x, 1 + x) (2101.03961 section 2.2)."""
    layer = MoELayer(layer_config(router="switch", k=1, router_jitter=0.3), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (50, 8))
    inputs = RouterInputs(jnp.zeros(50, jnp.int32))
    calm = layer.route(x, inputs).logits_TE
    np.testing.assert_allclose(calm, x @ layer.router_ED[...].T, atol=1e-5)
    one = layer.route(x, inputs._replace(rng=jax.random.key(0))).logits_TE
    other = layer.route(x, inputs._replace(rng=jax.random.key(1))).logits_TE
    assert jnp.abs(one - calm).max() > 0.05
    assert jnp.abs(one - other).max() > 0.05
    bound = 0.3 * jnp.abs(x) @ jnp.abs(layer.router_ED[...]).T
    assert (jnp.abs(one - calm) <= bound + 1e-5).all()


def test_stats_of_a_batch():
    layer = MoELayer(layer_config(router_z_factor=1e-3), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    valid = jnp.arange(9)[None, :] < jnp.array([[9], [4]])
    _, stats = layer(x, jnp.zeros((2, 9), jnp.int32), valid)
    assert stats.load_E.sum() == 2 * 13  # K times the valid tokens
    assert stats.tokens == 13
    assert 0 < stats.sums["entropy"] <= 13 * np.log(6)
    logits = np.asarray(x)[np.asarray(valid)] @ np.asarray(layer.router_ED[...]).T
    z = np.log(np.exp(logits).sum(axis=1)) ** 2
    np.testing.assert_allclose(stats.sums["z"], z.sum(), rtol=1e-5)
    assert stats.sums["top_gate"] < stats.sums["gate_sum"] < 13
    assert set(stats.terms) == {"expert_balance", "router_z"}


SCORED = [
    (name, scoring)
    for name, router in ROUTERS.items()
    for scoring in ("softmax", "sigmoid")
    if router.learned and not name.startswith("replay")
    if scoring == "softmax" or "scoring_func" in router.reads
]


@pytest.mark.parametrize(("router", "scoring"), SCORED)
@pytest.mark.parametrize("backend", ["loop", "auto"])
def test_what_is_logged_of_a_routing(router, scoring, backend):
    """In plain numpy, from the logits, the affinities, the gates and the chosen experts."""
    balance = {"expert_balance_factor": 0.0} if ROUTERS[router].balanced else {}
    config = layer_config(k=ROUTERS[router].top or 2, router=router, scoring_func=scoring,
                          expert_backend=backend, **balance)  # fmt: skip
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    layer.router_ED[...] *= 20.0  # affinities far from even
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    valid = jnp.arange(9)[None, :] < jnp.array([[9], [4]])
    _, stats = layer(x, jnp.zeros((2, 9), jnp.int32), valid)
    inputs = RouterInputs(jnp.zeros(18, jnp.int32), valid_T=valid.reshape(-1))
    routing = jax.tree.map(np.asarray, layer.route(x.reshape(18, 8), inputs))
    valid = np.asarray(valid).reshape(-1)
    p_TE = routing.affinity_TE[valid].astype(np.float64)
    entropy = -np.where(p_TE > 0, p_TE * np.log(np.maximum(p_TE, 1e-300)), 0.0).sum()
    np.testing.assert_allclose(stats.sums["entropy"], entropy, rtol=1e-4)
    z = (np.log(np.exp(routing.logits_TE[valid].astype(np.float64)).sum(axis=1)) ** 2).sum()
    np.testing.assert_allclose(stats.sums["z"], z, rtol=1e-5)
    np.testing.assert_allclose(stats.sums["top_gate"], routing.gates_TK[valid, 0].sum(), rtol=1e-6)
    np.testing.assert_allclose(stats.sums["gate_sum"], routing.gates_TK[valid].sum(), rtol=1e-6)
    assert stats.tokens == valid.sum()
    sent_E = np.bincount(routing.ids_TK[valid].reshape(-1), minlength=7)[:6]
    np.testing.assert_array_equal(stats.ledger.sent_E, sent_E)
    np.testing.assert_array_equal(stats.ledger.computed_E, sent_E)


def test_stats_of_a_batch_of_which_some_is_dropped():
    """Balance terms and load, which moves the bias, are of what the router wants."""
    config = {"expert_groups": 2, "device_balance_factor": 0.1, "capacity_factor": 0.3}
    layer = MoELayer(layer_config(**config), rngs=nnx.Rngs(0))
    x, ids = jax.random.normal(jax.random.key(1), (2, 9, 8)), jnp.zeros((2, 9), jnp.int32)
    valid, rng = jnp.ones((2, 9), bool), jax.random.key(0)
    (_, whole), (_, cut) = (layer(x, ids, valid, r) for r in (None, rng))
    assert cut.ledger.dropped_E.sum() > 0
    np.testing.assert_array_equal(cut.load_E, whole.load_E)
    for name in ("expert_balance", "device_balance"):
        np.testing.assert_allclose(cut.terms[name].products, whole.terms[name].products, rtol=1e-6)
    assert cut.sums["z"] == whole.sums["z"]
    devices_TK = np.asarray(cut.choice.ids).reshape(18, 2) // 3  # nobody is on device 2
    rows_D = [(devices_TK == d).any(axis=1).sum() for d in range(2)]
    np.testing.assert_array_equal(cut.device_rows_D, rows_D)
    assert cut.device_rows_D.sum() < whole.device_rows_D.sum()


def test_the_bias_chooses_in_evaluation_too():
    layer = MoELayer(layer_config(bias_update_speed=1e-3), rngs=nnx.Rngs(0))
    for i in range(6):
        layer.bias_E[...] = jnp.zeros(6).at[i].set(2.0)
        routing = layer.route(jnp.ones((3, 8)), RouterInputs(jnp.zeros(3, jnp.int32)))
        np.testing.assert_array_equal(routing.ids_TK[:, 0], i)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router": "nope"}, r"model\.moe\.router\.name='nope'"),
        ({"dispatch": "nope"}, r"model\.moe\.dispatch\.name='nope'"),
        ({"expert_backend": "nope"}, r"model\.moe\.expert_backend='nope'"),
        ({"router": "hash", "k": 1}, r"expert_balance_factor=0\.01: the hash router has no"),
        ({"router": "expert_choice"}, r"expert_balance_factor=0\.01: the expert_choice router"),
        (
            {"router": "uniform", "expert_balance_factor": 0.0, "router_z_factor": 0.1},
            r"router_z_factor=0\.1: the uniform router has no",
        ),
    ],
)
def test_refused_at_construction(moe, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(layer_config(**moe), rngs=nnx.Rngs(0))
