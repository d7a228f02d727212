"""The whole layer: every router x dispatch x backend against the reference."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import Config, replace
from dsmoe_jax.moe import experts, kernels, reference
from dsmoe_jax.moe.dispatch import local
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routers import ROUTERS
from dsmoe_jax.moe.types import MoEInputs, RouterInputs, Routing
from tests.tools.routing import TASKS, tasks_of

D = 8
SMALL = {
    "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 12,
}  # fmt: skip


def make_layer(**changed):
    """A layer of the small sizes; dotted keys of `model.moe`, with "__" for the dots, changed."""
    keys = {f"model.moe.{key.replace('__', '.')}": v for key, v in {**SMALL, **changed}.items()}
    tasks = tasks_of(keys.get("model.moe.router.name", "topk"))
    moe = replace(Config(), **keys, **{"model.moe.router.tasks": tasks}).model.moe
    layer = MoELayer(moe, hidden_size=D, vocab_size=50, initializer_range=0.4, rngs=nnx.Rngs(0))
    if hasattr(layer, "table_VK"):  # of a router that has its experts from the training text
        k = moe.num_experts_per_tok
        layer.table_VK[...] = (jnp.arange(50)[:, None] + jnp.arange(k)) % moe.n_choices
    return layer


def wide(ffn):
    """The matrices of the shared experts."""
    return ffn.gate_FD[...], ffn.up_FD[...], ffn.down_DF[...]


def value_and_gradients(layer, x_BSD, token_ids_BS, apply):
    """The output, and gradients to the input and all parameters of a fixed projection of it."""
    graph, params, other = nnx.split(layer, nnx.Param, ...)
    probe = jax.random.normal(jax.random.key(7), x_BSD.shape)

    def loss(params, x_BSD):
        y_BSD = apply(nnx.merge(graph, params, other), x_BSD, token_ids_BS)
        return (y_BSD * probe).sum(), y_BSD

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y_BSD), grads = step(params, x_BSD)
    return y_BSD, grads


def router_matrix(layer):
    """The learned parameter of the router: (E, D), or (E, A) of one by task."""
    return layer.router_EA if hasattr(layer, "router_EA") else layer.router_ED


def run_layer(layer, x_BSD, token_ids_BS):
    valid_BS = jnp.ones(token_ids_BS.shape, bool)
    task_ids_BS = token_ids_BS % len(TASKS)
    return layer(x_BSD, MoEInputs(token_ids_BS, valid_BS, task_ids_BS=task_ids_BS))[0]


def run_reference(layer, x_BSD, token_ids_BS):
    """The dense loop, with the layer's own routing."""
    x_TD = x_BSD.reshape(-1, D)
    token_ids_T = token_ids_BS.reshape(-1)
    inputs = RouterInputs(token_ids_T, task_ids_T=token_ids_T % len(TASKS))
    routing, _ = layer.route(x_TD, inputs)
    routed = layer.gate_EFD[...], layer.up_EFD[...], layer.down_EDF[...]
    shared = wide(layer.shared) if layer.config.n_shared_experts else None
    return reference.moe_layer(x_TD, routing, routed, shared).reshape(x_BSD.shape)


# Every backend with a router of each kind of routing (K chosen, one fixed, unassigned ones among
# the chosen); every other router with the quickest backend.  Replay needs a recording, see
# tests/training/test_recording.py.
COMBINATIONS = [(r, b) for r in ("topk", "hash", "expert_choice") for b in experts.BACKENDS]
COMBINATIONS += [
    (r, "loop")
    for r in ROUTERS
    if (r, "loop") not in COMBINATIONS and not ROUTERS[r].needs_recording
]


def without_balance(router):
    """For a router that has nothing to balance: no balance term."""
    return {"balance__expert": None} if ROUTERS[router].balanced else {}


@pytest.mark.parametrize(("router", "backend"), COMBINATIONS)
def test_agrees_with_the_dense_loop(router, backend):
    """On one device; dispatch between devices has its own tests."""
    if backend == "tokamax":
        pytest.importorskip("tokamax")
    layer = make_layer(
        num_experts_per_tok=ROUTERS[router].top or 3, router__name=router, expert_backend=backend,
        **without_balance(router),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 50)
    got = value_and_gradients(layer, x, tokens, run_layer)
    want = value_and_gradients(layer, x, tokens, run_reference)
    chex.assert_trees_all_close(got, want, atol=3e-5, rtol=3e-5)
    if (
        ROUTERS[router].learned and not ROUTERS[router].samples
    ):  # that one learns from the loss alone
        assert jnp.abs(router_matrix(got[1][0])[...]).max() > 1e-3


def by_dispatch(x, gates, ids, n_experts):
    """Local dispatch to experts that multiply by their number: any misplaced row shows."""
    there = local.dispatch(x, Routing(ids, gates, None), n_experts, kernels.JAX_ROWS)
    number = jnp.arange(1.0, n_experts + 1)
    rows = there.rows_ND
    factor = jnp.repeat(number, there.group_sizes_e, total_repeat_length=len(rows))
    return local.combine(rows * factor[:, None], there.state, kernels.JAX_ROWS)


def by_formula(x, gates, ids, n_experts):
    del n_experts
    return (gates * (ids + 1.0)).sum(axis=1)[:, None] * x


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_pullback(apply, x, gates, ids, n_experts):
    y, pull = jax.vjp(lambda x, gates: apply(x, gates, ids, n_experts), x, gates)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))


@settings(max_examples=30)
@given(sizes=st.sampled_from([(1, 1, 1), (7, 4, 2), (5, 3, 3)]), data=st.data())
def test_local_dispatch_for_any_routing(sizes, data):
    """Any ids at all, empty experts and one expert taking all among them; with gradients."""
    t, e, k = sizes
    ids = np.array([data.draw(st.permutations(range(e)))[:k] for _ in range(t)], np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x, gates = (rng.normal(size=shape).astype(np.float32) for shape in ((t, 4), (t, k)))
    got = value_and_pullback(by_dispatch, x, gates, ids, e)
    want = value_and_pullback(by_formula, x, gates, ids, e)
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_the_routing_of_v1_is_the_reference():
    """Softmax, K best, gates not renormalised: all four fields, and a layer made of them."""
    layer = make_layer()
    x = jax.random.normal(jax.random.key(1), (1, 9, D))
    wanted = reference.route(x[0], layer.router_ED[...], 2)
    found, _ = layer.route(x[0], RouterInputs(jnp.zeros(9, jnp.int32)))
    chex.assert_trees_all_close(found, wanted, atol=1e-6)
    routed = layer.gate_EFD[...], layer.up_EFD[...], layer.down_EDF[...]
    y = reference.moe_layer(x[0], wanted, routed, wide(layer.shared))
    np.testing.assert_allclose(run_layer(layer, x, jnp.zeros((1, 9), jnp.int32))[0], y, atol=1e-5)


def test_the_reference_in_plain_numpy():
    """V1 eqs. 9-11 and SwiGLU token by token: the oracle of the other tests is itself checked."""
    rng = np.random.default_rng(0)
    t, e, f, k = 5, 4, 3, 2
    x, router = rng.normal(size=(t, D)), rng.normal(size=(e, D))
    gate, up, down = (rng.normal(size=s) for s in ((e, f, D), (e, f, D), (e, D, f)))
    shared = tuple(rng.normal(size=s) for s in ((f, D), (f, D), (D, f)))

    def ffn(u, gate, up, down):
        g = gate @ u
        return down @ (g / (1 + np.exp(-g)) * (up @ u))

    wanted = np.zeros((t, D))
    for i, u in enumerate(x):
        s = np.exp(router @ u) / np.exp(router @ u).sum()
        wanted[i] = ffn(u, *shared)
        for j in np.argsort(-s)[:k]:
            wanted[i] += s[j] * ffn(u, gate[j], up[j], down[j])
    as_float32 = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32), (x, router, gate, up, down, shared)
    )
    x, router, *routed, shared = as_float32
    found = reference.moe_layer(x, reference.route(x, router, k), routed, shared)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_shared_experts_are_one_wide_ffn():
    """Two shared experts of width f are the sum of two FFNs cut out of the wide one."""
    layer = make_layer(n_routed_experts=0, num_experts_per_tok=0, n_shared_experts=2)
    x = jax.random.normal(jax.random.key(1), (1, 5, D))
    y, report = layer(x, MoEInputs(jnp.zeros((1, 5), jnp.int32), jnp.ones((1, 5), bool)))
    assert report is None
    gate, up, down = wide(layer.shared)
    halves = [reference.ffn(x[0], gate[s], up[s], down[:, s]) for s in (slice(12), slice(12, 24))]
    np.testing.assert_allclose(y[0], sum(halves), atol=1e-5)


def test_router_is_float32_even_when_activations_are_bfloat16():
    layer = make_layer()
    inputs = RouterInputs(jnp.zeros(3, jnp.int32))
    routing, _ = layer.route(jnp.ones((3, 8), jnp.bfloat16), inputs)
    assert (
        routing.logits_TE.dtype
        == routing.gates_TK.dtype
        == routing.affinity_TE.dtype
        == jnp.float32
    )


def test_bfloat16_logits_are_for_comparison():
    """Switch trains its router in float32 and everything else in bfloat16 (2101.03961, 2.4)."""
    x = jax.random.normal(jax.random.key(1), (50, 8))
    inputs = RouterInputs(jnp.zeros(50, jnp.int32))
    layer = make_layer(router__logits_dtype="bfloat16")
    routing, _ = layer.route(x, inputs)
    rounded = routing.logits_TE.astype(jnp.bfloat16)
    np.testing.assert_array_equal(routing.logits_TE, rounded.astype(jnp.float32))
    exact = np.asarray(x, np.float64) @ np.asarray(layer.router_ED[...], np.float64).T
    np.testing.assert_allclose(routing.logits_TE, exact, atol=0.02 * np.abs(exact).max())
    assert routing.gates_TK.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"router.logits_dtype='bfloat16': the hash router does"):
        make_layer(router__name="hash", num_experts_per_tok=1, router__logits_dtype="bfloat16")


def test_jitter_is_for_training_only():
    """The router's input is scaled by U(1 - x, 1 + x) (2101.03961 section 2.2)."""
    layer = make_layer(router__name="switch", num_experts_per_tok=1, router__jitter=0.3)
    x = jax.random.normal(jax.random.key(1), (50, 8))
    inputs = RouterInputs(jnp.zeros(50, jnp.int32))
    calm = layer.route(x, inputs)[0].logits_TE
    np.testing.assert_allclose(calm, x @ layer.router_ED[...].T, atol=1e-5)
    one = layer.route(x, inputs._replace(rng=jax.random.key(0)))[0].logits_TE
    other = layer.route(x, inputs._replace(rng=jax.random.key(1)))[0].logits_TE
    assert jnp.abs(one - calm).max() > 0.05
    assert jnp.abs(one - other).max() > 0.05
    bound = 0.3 * jnp.abs(x) @ jnp.abs(layer.router_ED[...]).T
    assert (jnp.abs(one - calm) <= bound + 1e-5).all()


def test_report_of_a_batch():
    layer = make_layer(balance__router_z__factor=1e-3)
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    valid = jnp.arange(9)[None, :] < jnp.array([[9], [4]])
    _, report = layer(x, MoEInputs(jnp.zeros((2, 9), jnp.int32), valid))
    logged = report.logged
    assert logged.load_E.sum() == 2 * 13  # K times the valid tokens
    assert logged.tokens == 13
    assert 0 < logged.token_sums["entropy"] <= 13 * np.log(6)
    logits = np.asarray(x)[np.asarray(valid)] @ np.asarray(layer.router_ED[...]).T
    z = np.log(np.exp(logits).sum(axis=1)) ** 2
    np.testing.assert_allclose(logged.token_sums["z"], z.sum(), rtol=1e-5)
    assert logged.token_sums["top_gate"] < logged.token_sums["gate_sum"] < 13
    assert set(report.loss_inputs.terms) == {"expert", "router_z"}


SCORED = [
    (name, scoring)
    for name, router in ROUTERS.items()
    for scoring in ("softmax", "sigmoid")
    if router.learned and not router.needs_recording
    if scoring == "softmax" or "scoring_func" in router.reads
]


@pytest.mark.parametrize(("router", "scoring"), SCORED)
@pytest.mark.parametrize(("backend", "rows"), [("loop", "jax"), ("auto", "auto")])
def test_what_is_logged_of_a_routing(router, scoring, backend, rows):
    """In plain numpy, from the logits, the affinities, the gates and the chosen experts."""
    layer = make_layer(
        num_experts_per_tok=ROUTERS[router].top or 2, router__name=router,
        router__scoring_func=scoring, expert_backend=backend, row_kernels=rows,
        **without_balance(router),
    )  # fmt: skip
    router_matrix(layer)[...] *= 20.0  # affinities far from even
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    valid = jnp.arange(9)[None, :] < jnp.array([[9], [4]])
    zeros = jnp.zeros((2, 9), jnp.int32)
    task_ids = jnp.arange(18).reshape(2, 9) % len(TASKS)
    _, report = layer(x, MoEInputs(zeros, valid, task_ids_BS=task_ids))
    logged = report.logged
    inputs = RouterInputs(zeros.reshape(-1), valid.reshape(-1), task_ids_T=task_ids.reshape(-1))
    routing = jax.tree.map(np.asarray, layer.route(x.reshape(18, 8), inputs)[0])
    valid = np.asarray(valid).reshape(-1)
    p_TE = routing.affinity_TE[valid].astype(np.float64)
    entropy = -np.where(p_TE > 0, p_TE * np.log(np.maximum(p_TE, 1e-300)), 0.0).sum()
    np.testing.assert_allclose(logged.token_sums["entropy"], entropy, rtol=1e-4)
    z = (np.log(np.exp(routing.logits_TE[valid].astype(np.float64)).sum(axis=1)) ** 2).sum()
    np.testing.assert_allclose(logged.token_sums["z"], z, rtol=1e-5)
    np.testing.assert_allclose(
        logged.token_sums["top_gate"], routing.gates_TK[valid, 0].sum(), rtol=1e-6
    )
    np.testing.assert_allclose(
        logged.token_sums["gate_sum"], routing.gates_TK[valid].sum(), rtol=1e-6
    )
    assert logged.tokens == valid.sum()
    sent_E = np.bincount(routing.ids_TK[valid].reshape(-1), minlength=7)[:6]
    np.testing.assert_array_equal(logged.ledger.sent_E, sent_E)
    np.testing.assert_array_equal(logged.ledger.computed_E, sent_E)


def test_report_of_a_batch_of_which_some_is_dropped():
    """Balance terms and load, which moves the bias, are of what the router wants."""
    layer = make_layer(expert_groups=2, balance__device__factor=0.1, drop__capacity_factor=0.3)
    x = jax.random.normal(jax.random.key(1), (2, 9, D))
    inputs = MoEInputs(jnp.zeros((2, 9), jnp.int32), jnp.ones((2, 9), bool))
    (_, whole), (_, cut) = (layer(x, inputs._replace(rng=r)) for r in (None, jax.random.key(0)))
    assert cut.logged.ledger.dropped_E.sum() > 0
    np.testing.assert_array_equal(cut.logged.load_E, whole.logged.load_E)
    chex.assert_trees_all_close(cut.loss_inputs, whole.loss_inputs, rtol=1e-6)
    assert set(cut.loss_inputs.terms) == {"expert", "device"}
    assert cut.logged.token_sums["z"] == whole.logged.token_sums["z"]
    devices_TK = np.asarray(cut.recorded.ids).reshape(18, 2) // 3  # unassigned ones are on device 2
    rows_D = [(devices_TK == d).any(axis=1).sum() for d in range(2)]
    np.testing.assert_array_equal(cut.logged.device_rows_D, rows_D)
    assert cut.logged.device_rows_D.sum() < whole.logged.device_rows_D.sum()


def test_the_bias_chooses_in_evaluation_too():
    layer = make_layer(router__bias_update_speed=1e-3)
    for i in range(6):
        layer.bias_E[...] = jnp.zeros(6).at[i].set(2.0)
        routing, _ = layer.route(jnp.ones((3, 8)), RouterInputs(jnp.zeros(3, jnp.int32)))
        np.testing.assert_array_equal(routing.ids_TK[:, 0], i)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router__name": "nope"}, r"model\.moe\.router\.name='nope'"),
        ({"dispatch__name": "nope"}, r"model\.moe\.dispatch\.name='nope'"),
        ({"expert_backend": "nope"}, r"model\.moe\.expert_backend='nope'"),
        ({"row_kernels": "nope"}, r"model\.moe\.row_kernels='nope'"),
        ({"router__scoring_func": "tanh"}, r"router\.scoring_func='tanh': must be one of \['sig"),
        (
            {"router__name": "hash", "num_experts_per_tok": 1, "router__logits_bias": True},
            r"router\.logits_bias=True: the hash router does not know it",
        ),
        (
            {"router__name": "token_table"},
            r"balance\.expert\.factor=0\.01: the token_table router has",
        ),
        (
            {
                "router__name": "token_table",
                "balance__expert": None,
                "router__bias_update_speed": 1e-3,
            },
            r"router\.bias_update_speed=0\.001: the token_table router does not know it",
        ),
        (
            {"n_identity_experts": 2, "router__n_group": 2},
            r"router\.n_group=2: identity experts are in no group; with them it must be 1",
        ),
        (
            {
                "n_identity_experts": 2,
                "n_routed_experts": 0,
                "num_experts_per_tok": 0,
            },
            r"n_identity_experts=2: needs n_routed_experts > 0; must be 0",
        ),
        (
            {"expert__name": "gpt_oss", "expert_backend": "native"},
            r"expert_backend='native': computes SwiGLU experts without biases and no others",
        ),
        (
            {"n_shared_experts": 0, "shared_expert_gate": True},
            r"shared_expert_gate=True: there is no shared expert; must be False",
        ),
        (
            {"n_shared_experts": 0, "shared_expert_intermediate_size": 9},
            r"shared_expert_intermediate_size=9: there is no shared expert; must be None",
        ),
        (
            {"router__name": "hash", "num_experts_per_tok": 1},
            r"balance\.expert\.factor=0\.01: the hash router has no",
        ),
        (
            {"router__name": "expert_choice"},
            r"balance\.expert\.factor=0\.01: the expert_choice router has no",
        ),
        (
            {
                "router__name": "uniform",
                "balance__expert": None,
                "balance__router_z__factor": 0.1,
            },
            r"balance\.router_z\.factor=0\.1: the uniform router has no",
        ),
        ({"balance__exprt__factor": 0.1}, r"balance\.exprt\.factor=0\.1: .* mean expert\?"),
    ],
)
def test_refused_at_construction(moe, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**moe)


def test_a_gate_and_a_width_of_the_shared_expert():
    """Qwen2-MoE: the shared output times sigmoid(x . w); its FFN has a width of its own."""
    layer = make_layer(
        n_shared_experts=2, shared_expert_gate=True, shared_expert_intermediate_size=5
    )
    assert layer.shared.gate_FD.shape == (10, D)
    x = jax.random.normal(jax.random.key(1), (1, 5, D))
    tokens = jnp.zeros((1, 5), jnp.int32)
    gated = run_layer(layer, x, tokens)
    layer.shared_gate_D[...] = jnp.full(D, 1e3) * jnp.sign(layer.shared_gate_D[...])
    plain = reference.ffn(x[0], *wide(layer.shared))
    logit = x[0] @ layer.shared_gate_D[...]
    routed = run_layer(layer, x, tokens)[0] - plain * (logit > 0)[:, None]
    layer.shared_gate_D[...] = jnp.arange(D) / 4.0
    share = 1 / (1 + np.exp(-np.asarray(x[0]) @ np.arange(D) / 4.0))
    np.testing.assert_allclose(
        run_layer(layer, x, tokens)[0], routed + share[:, None] * plain, atol=1e-5
    )
    assert jnp.abs(gated[0] - routed - plain).max() > 1e-2


def test_a_bias_of_the_logits():
    """It is added to every logit, and to the mean that the log uses."""
    layer = make_layer(router__logits_bias=True)
    x = jax.random.normal(jax.random.key(1), (50, D))
    inputs = RouterInputs(jnp.zeros(50, jnp.int32))
    plain, _ = layer.route(x, inputs)
    layer.router_bias_E[...] = 3.0 * jnp.arange(6) - 2.0
    found, mean_T = layer.route(x, inputs)
    wanted = np.asarray(plain.logits_TE) + 3.0 * np.arange(6) - 2.0
    np.testing.assert_allclose(found.logits_TE, wanted, atol=1e-5)
    np.testing.assert_allclose(mean_T, wanted.mean(axis=1), atol=1e-5)
    np.testing.assert_array_equal(found.ids_TK, np.argsort(-wanted, axis=1)[:, :2])
    assert (found.ids_TK != plain.ids_TK).any()
