"""Run by test_dispatch.py in a process with eight virtual devices.

The oracle is one dense loop over the experts on one device, in values and in every gradient.

Shapes: T tokens, D hidden, F expert width, E experts, K activated.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import ModelConfig, MoEConfig
from dsmoe_jax.moe import capacity, dispatch, experts
from dsmoe_jax.moe.layer import MoELayer, nobody_computes_padding
from dsmoe_jax.moe.types import RouterInputs, Routing

T, D, F, E, K = 48, 8, 8, 8, 3
MESHES = {  # data, fsdp, expert, tensor
    "fsdp 4, tensor 2": (1, 4, 1, 2),
    "data 2, fsdp 2, expert 2": (2, 2, 2, 1),
    "fsdp 2, expert 2, tensor 2": (1, 2, 2, 2),
    "data 2, expert 4": (2, 1, 4, 1),
    "expert 4, tensor 2": (1, 1, 4, 2),
    "expert 8": (1, 1, 8, 1),
}
EXPERT_PARALLEL = [name for name in dispatch.DISPATCHERS if name != "local"]


def set_mesh(name):
    auto = (jax.sharding.AxisType.Auto,) * 4
    axes = ("data", "fsdp", "expert", "tensor")
    return jax.set_mesh(jax.make_mesh(MESHES[name], axes, axis_types=auto))


def routings():
    """ids_TK by name: the shapes that break dispatchers."""
    rng = np.random.default_rng(0)
    draw = lambda p: np.stack([rng.choice(E, K, replace=False, p=p) for _ in range(T)])  # noqa: E731
    skewed = np.array([0.5, 0.2, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01])
    some = draw(None)
    return {
        "uniform": draw(None),
        "skewed": draw(skewed),
        "one expert takes all": np.tile([5, E, E], (T, 1)),
        "one device takes all": np.tile([1, 0, 2], (T, 1)),
        "empty experts and devices": np.tile([7, 1, 3], (T, 1)),
        "some to nobody": np.where(rng.random((T, K)) < 0.4, E, some),
        "all to nobody": np.full((T, K), E),
    }


@functools.cache
def arrays():
    keys = iter(jax.random.split(jax.random.key(0), 6))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    weights = experts.ExpertWeights(normal(E, F, D), normal(E, F, D), normal(E, D, F))
    return normal(T, D), jax.nn.sigmoid(normal(T, K)), weights, normal(T, D)


def with_gradients(apply):
    """`(x, ids, gates, weights, dy) -> y, (dx, dgates, dweights)`, jitted."""

    @jax.jit
    def run(x, ids, gates, weights, dy):
        gates = jnp.where(ids == E, 0, gates)
        y, pull, aux = jax.vjp(lambda *a: apply(a[0], ids, *a[1:]), x, gates, weights, has_aux=True)
        return (y, pull(dy)), aux

    return run


def dense_loop(x, ids, gates, weights):
    y = jnp.zeros_like(x)
    for i in range(E):
        gate, up, down = (w[i] for w in weights)
        hidden = jax.nn.silu(x @ gate.T) * (x @ up.T)
        y += jnp.where(ids == i, gates, 0).sum(axis=1)[:, None] * (hidden @ down.T)
    return y, None


oracle = with_gradients(dense_loop)


def by_name(result, ids):
    y, (dx, dgates, dweights) = result
    # A gate of nobody is 0 and stays so: its gradient is never used.
    return {"y": y, "dx": dx, "dgates": np.where(ids == E, 0, dgates), **dweights._asdict()}


def compare(got, want, routing):
    for key, value in want.items():
        np.testing.assert_allclose(
            got[key], value, atol=1e-4, rtol=1e-4, err_msg=f"{key}, routing {routing!r}"
        )


def check(config, mesh):
    """Compares with the oracle for every routing; returns what the exchanges took, by routing."""

    def apply(x, ids, gates, weights):
        run = functools.partial(experts.run_experts, backend=config.expert_backend)
        return dispatch.dispatch(x, Routing(ids, gates, None), weights, run, config)

    x, gates, weights, dy = arrays()
    took = {}
    with set_mesh(mesh):
        run = with_gradients(apply)
        for name, ids in routings().items():
            ids = jnp.asarray(ids, jnp.int32)
            got, took[name] = jax.device_get(run(x, ids, gates, weights, dy))
            want, _ = jax.device_get(oracle(x, ids, gates, weights, dy))
            compare(by_name(got, ids), by_name(want, ids), name)
            load_E = np.bincount(ids.reshape(-1), minlength=E + 1)[:E]
            np.testing.assert_array_equal(took[name].computed_E, load_E, name)
    return took


def config(name, backend="ragged_dot", **moe):
    return MoEConfig(E, 0, K, F, dispatch=name, expert_backend=backend, **moe)


# All dispatchers with all backends, and the first one on every mesh.
BACKEND_ON = {
    "fsdp 2, expert 2, tensor 2": "blocked",
    "expert 4, tensor 2": "loop",
    "expert 8": "ragged_dot",
}
CASES = [(name, *case) for name in EXPERT_PARALLEL for case in BACKEND_ON.items()]
CASES += [("all_to_all", mesh, "ragged_dot") for mesh in MESHES if mesh not in BACKEND_ON]


@pytest.mark.parametrize(("name", "mesh", "backend"), CASES)
def test_agrees_with_the_dense_loop(name, mesh, backend):
    check(config(name, backend), mesh)


@pytest.mark.parametrize("backend", ["ragged_dot", "blocked"])
def test_local_where_experts_are_not_split(backend):
    check(config("local", backend), "fsdp 4, tensor 2")


def test_rows_travel_once_to_a_device():
    """Distinct (token, other device) pairs, counted in numpy, on two groups of four devices."""
    took = check(config("all_to_all"), "data 2, expert 4")
    home_T = np.arange(T) // (T // 8) % 4  # shards are data-major
    for name, ids in routings().items():
        pairs = {(t, i // 2) for t in range(T) for i in ids[t] if i < E}
        assert took[name].rows == sum(device != home_T[t] for t, device in pairs), name


@pytest.mark.parametrize("name", EXPERT_PARALLEL)
def test_in_chunks(name):
    took = check(config(name, exchange_chunks=3), "data 2, expert 4")
    assert not any(t.retries for t in took.values())


@pytest.mark.parametrize("name", ["all_to_all", "all_gather"])
def test_small_buffers_lose_nothing(name):
    """Room for twice the mean: only two of three choices on one device are more than that."""
    took = check(config(name, buffer_factor=2.0), "data 2, expert 4")
    for routing, t in took.items():
        assert t.retries == (routing == "one device takes all"), routing


def test_accelerators_get_the_ragged_exchange():
    """There XLA has the primitive; rows, labels and results go, and their gradients come back."""
    x, gates, weights, _ = arrays()
    run = functools.partial(experts.run_experts, backend="ragged_dot")

    def total(x, gates, weights):
        routing = Routing(jnp.asarray(routings()["uniform"], jnp.int32), gates, None)
        return dispatch.dispatch(x, routing, weights, run, config("all_to_all"))[0].sum()

    with set_mesh("expert 8"):
        gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
        traced = gradients.trace(x, gates, weights)
        for platform, calls in (("tpu", 6), ("cuda", 6), ("cpu", 0)):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert text.count("@ragged_all_to_all") == calls, platform


def test_tokens_that_do_not_divide_evenly():
    """One prompt on eight devices."""
    x, gates, weights, _ = arrays()
    ids = jnp.asarray(routings()["uniform"], jnp.int32)
    routing = Routing(ids[:5], gates[:5], None)
    run = functools.partial(experts.run_experts, backend="loop")
    with set_mesh("expert 8"):
        apply = jax.jit(
            functools.partial(dispatch.dispatch, run_experts=run, config=config("all_to_all"))
        )
        y, _ = apply(x[:5], routing, weights)
    np.testing.assert_allclose(y, dense_loop(x, ids, gates, weights)[0][:5], atol=1e-4)


@pytest.mark.parametrize("policy", ["position", "device"])
def test_capacity_of_each_shard(policy):
    """Fixed buffers: each of eight shards drops by itself, and what it keeps is computed."""
    moe = MoEConfig(
        E, 0, K, F, dispatch="capacity", expert_backend="ragged_dot", capacity_factor=0.8,
        drop_policy=policy, expert_groups=2, protected_share=0.5,
    )  # fmt: skip
    model = ModelConfig(hidden_size=D, initializer_range=0.5, moe=moe)
    graph, params = nnx.split(MoELayer(model, rngs=nnx.Rngs(0)))
    x, _, _, dy = arrays()
    b, s = 16, T // 16
    valid = jnp.arange(s) < 3 - (jnp.arange(b) % 5 == 0)[:, None]
    tokens, rng = jnp.zeros((b, s), jnp.int32), jax.random.key(0)

    @jax.jit
    def run(params, x):
        def apply(params, x):
            y, stats = nnx.merge(graph, params)(x.reshape(b, s, D), tokens, valid, rng)
            return y.reshape(T, D), stats.ledger

        y, pull, ledger = jax.vjp(apply, params, x, has_aux=True)
        return (y, pull(dy)), ledger

    @jax.jit
    def want(params, x):
        def apply(params, x):
            layer = nnx.merge(graph, params)
            routing = layer.route(x, RouterInputs(tokens.reshape(-1), valid.reshape(-1), rng))
            routing = nobody_computes_padding(routing, valid, E)
            kept, ledger = capacity.drop(routing, valid, jnp.arange(b), 0.8, moe, shards=8)
            weights = layer.gate_EFD[...], layer.up_EFD[...], layer.down_EDF[...]
            return dense_loop(x, kept.ids_TK, kept.gates_TK, weights)[0], (ledger, kept.ids_TK)

        y, pull, aux = jax.vjp(apply, params, x, has_aux=True)
        return (y, pull(dy)), aux

    with set_mesh("data 2, expert 4"):
        got, ledger = jax.device_get(run(params, x))
    expected, (expected_ledger, kept) = jax.device_get(want(params, x))
    close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
    jax.tree.map(close, (got, ledger), (expected, expected_ledger))
    assert ledger.dropped_E.sum() > 0
    on_device = (kept.reshape(8, -1, 1) // 2 == np.arange(4)).sum(axis=1)
    assert on_device.max() <= capacity.most_kept((b // 8, s), 0.8, moe, 4)


@pytest.mark.parametrize(
    ("name", "mesh", "n_experts", "message"),
    [
        ("all_to_all", None, 8, r"model\.moe\.dispatch='all_to_all': .*no mesh; must be 'auto' or"),
        ("local", "expert 8", 8, r"model\.moe\.dispatch='local': .* expert=8 .*'all_to_all'"),
        ("all_to_all", "expert 8", 6, r"mesh\.expert=8: must divide .*n_routed_experts=6"),
        ("nope", "expert 8", 8, r"model\.moe\.dispatch='nope'"),
    ],
)
def test_refused(name, mesh, n_experts, message):
    x, gates, weights, _ = arrays()
    weights = jax.tree.map(lambda w: w[:n_experts], weights)
    routing = Routing(jnp.zeros((T, K), jnp.int32), gates, None)
    run = functools.partial(experts.run_experts, backend="loop")
    with (
        set_mesh(mesh) if mesh else contextlib.nullcontext(),
        pytest.raises(ValueError, match=message),
    ):
        dispatch.dispatch(x, routing, weights, run, config(name))
