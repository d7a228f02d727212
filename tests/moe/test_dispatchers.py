"""Promises of single dispatchers, on eight devices.

That they all compute the same is in test_dispatch_product.py.

Shapes: T tokens, D hidden, F expert width, E experts, K activated.
"""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_dispatch_product import (
    D,
    E,
    F,
    K,
    T,
    arrays,
    config,
    routed,
    routings,
    set_mesh,
)

from dsmoe_jax.config import DispatchConfig, DropConfig, MoEConfig
from dsmoe_jax.config.mesh import AXES
from dsmoe_jax.model.remat import REMAT
from dsmoe_jax.moe import dispatch, dropping, experts, reference
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs, RouterInputs, Routing, unassign
from dsmoe_jax.nn import kept

pytestmark = pytest.mark.eight_devices
EXPERT_8, DATA_2_EXPERT_4 = (1, 1, 8, 1), (2, 1, 4, 1)


def test_accelerators_get_the_ragged_exchange():
    """There XLA has the primitive; rows, labels and results go, and their gradients come back."""
    x, _, gates, weights, _ = arrays()

    def total(x, gates, weights):
        routing = Routing(jnp.asarray(routings()["uniform"], jnp.int32), gates, None)
        return routed(config("all_to_all", "ragged_dot"))(x, routing, weights)[0].sum()

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, gates, weights))
    for platform, calls in (("tpu", 6), ("cuda", 6), ("cpu", 0)):
        device = jax.sharding.AbstractDevice("any", 1, platform)
        mesh = jax.sharding.AbstractMesh(EXPERT_8, AXES[1:], abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
            traced = gradients.trace(*shapes)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("@ragged_all_to_all") == calls, platform


def test_rematerialisation_by_name_exchanges_nothing_again():
    """Rows and labels come once more in "full"; in all kinds the gradients are the same."""
    x, _, gates, weights, _ = arrays()
    arguments = (x, gates, weights)

    def gradients(kind):
        def total(x, gates, weights):
            routing = Routing(jnp.asarray(routings()["uniform"], jnp.int32), gates, None)
            return routed(config("all_to_all", "ragged_dot"))(x, routing, weights)[0].sum()

        if (policy := REMAT[kind].policy) is not None:
            total = jax.checkpoint(total, policy=policy)
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    device = jax.sharding.AbstractDevice("any", 1, "tpu")
    for kind, calls in (("none", 6), ("named", 6), ("full", 8)):
        mesh = jax.sharding.AbstractMesh(EXPERT_8, AXES[1:], abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            text = gradients(kind).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("@ragged_all_to_all") == calls, kind
    with set_mesh(EXPERT_8):
        wanted, found = gradients("none")(*arguments), gradients("named")(*arguments)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("name", [n for n, d in dispatch.DISPATCHERS.items() if d.needs_mesh])
def test_what_comes_from_other_devices_has_its_name(name):
    x, _, gates, weights, _ = arrays()
    routing = Routing(jnp.asarray(routings()["uniform"], jnp.int32), gates, None)
    with set_mesh(EXPERT_8):
        text = str(jax.make_jaxpr(routed(config(name)))(x, routing, weights))
    assert text.count(f"name[name={kept.RECEIVED}]") >= 2


def test_tokens_that_do_not_divide_evenly():
    """One prompt on eight devices."""
    x, _, gates, weights, _ = arrays()
    ids = jnp.asarray(routings()["uniform"], jnp.int32)
    routing = Routing(ids[:5], gates[:5], None)
    with set_mesh(EXPERT_8):
        y, report = jax.jit(routed(config("all_to_all")))(x[:5], routing, weights)
    np.testing.assert_allclose(y, reference.moe_layer(x[:5], routing, weights), atol=1e-4)
    np.testing.assert_array_equal(report.computed_E, np.bincount(ids[:5].ravel(), minlength=E))


def test_chunks_need_less_room():
    """Bytes of temporaries that XLA plans for a forward and backward pass; nothing is run."""
    t, d = 4096, 64

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    matrices = (shape(jnp.float32, E, F, d),) * 2 + (shape(jnp.float32, E, d, F),)
    arguments = (
        shape(jnp.float32, t, d), shape(jnp.float32, t, K), experts.ExpertWeights(*matrices),
        shape(jnp.int32, t, K),
    )  # fmt: skip

    def temporaries(**settings):
        run = routed(config("all_to_all", "ragged_dot", **settings))

        def total(x, gates, weights, ids):
            return run(x, Routing(ids, gates, None), weights)[0].sum()

        with set_mesh((1, 2, 4, 1)):
            gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
            return gradients.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(chunks=4) < 0.5 * temporaries()


@pytest.mark.parametrize("policy", ["position", "device"])
def test_capacity_of_each_shard(policy):
    """Fixed buffers: each of eight shards drops by itself, and what it keeps is computed."""
    drop = DropConfig(0.8, policy, protected_share=0.5)
    moe = MoEConfig(
        E, 0, K, F, dispatch=DispatchConfig("fixed_slots"), expert_backend="ragged_dot",
        drop=drop, expert_groups=2,
    )  # fmt: skip
    layer = MoELayer(moe, hidden_size=D, vocab_size=1, initializer_range=0.5, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x, *_, dy = arrays()
    b, s = 16, T // 16
    sizes = dropping.sizes_of(moe)
    valid = jnp.arange(s) < 3 - (jnp.arange(b) % 5 == 0)[:, None]
    inputs = MoEInputs(jnp.zeros((b, s), jnp.int32), valid, jax.random.key(0))

    @jax.jit
    def run(params, x):
        def apply(params, x):
            y, report = nnx.merge(graph, params)(x.reshape(b, s, D), inputs)
            return y.reshape(T, D), report.logged.ledger

        y, pull, ledger = jax.vjp(apply, params, x, has_aux=True)
        return (y, pull(dy)), ledger

    @jax.jit
    def want(params, x):
        def apply(params, x):
            layer = nnx.merge(graph, params)
            by_token = RouterInputs(jnp.zeros(T, jnp.int32), valid.reshape(-1), inputs.rng)
            routing, _ = layer.route(x, by_token)
            routing = unassign(routing, valid.reshape(-1, 1), E)
            kept = dropping.drop(routing, jnp.arange(b), drop, sizes, 8, valid.reshape(-1))
            computed_E = jnp.bincount(kept.ids_TK.reshape(-1), length=E + 1)[:E]
            ledger = dropping.ledger(
                routing.ids_TK, kept.ids_TK, computed_E.astype(jnp.float32), b, drop, sizes
            )
            weights = layer.gate_EFD[...], layer.up_EFD[...], layer.down_EDF[...]
            return reference.moe_layer(x, kept, weights), (ledger, kept.ids_TK)

        y, pull, aux = jax.vjp(apply, params, x, has_aux=True)
        return (y, pull(dy)), aux

    with set_mesh(DATA_2_EXPERT_4):
        got, ledger = jax.device_get(run(params, x))
    expected, (expected_ledger, kept) = jax.device_get(want(params, x))
    chex.assert_trees_all_close((got, ledger), (expected, expected_ledger), atol=1e-4, rtol=1e-4)
    assert ledger.dropped_E.sum() > 0
    on_device = (kept.reshape(8, -1, 1) // 2 == np.arange(4)).sum(axis=1)
    assert on_device.max() <= dropping.max_kept((b // 8, s), drop, sizes, 4)


@pytest.mark.parametrize(
    ("name", "mesh", "n_experts", "message"),
    [
        (
            "all_to_all",
            None,
            8,
            r"model\.moe\.dispatch\.name='all_to_all': .*no mesh; must be 'auto' or",
        ),
        ("local", EXPERT_8, 8, r"model\.moe\.dispatch\.name='local': .* expert=8 .*'all_to_all'"),
        ("all_to_all", EXPERT_8, 6, r"mesh\.expert=8: must divide .*n_routed_experts=6"),
    ],
)
def test_refused(name, mesh, n_experts, message):
    x, _, gates, weights, _ = arrays()
    weights = jax.tree.map(lambda w: w[:n_experts], weights)
    routing = Routing(jnp.zeros((T, K), jnp.int32), gates, None)
    with (
        set_mesh(mesh) if mesh else contextlib.nullcontext(),
        pytest.raises(ValueError, match=message),
    ):
        routed(config(name))(x, routing, weights)
