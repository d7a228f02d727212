"""Forms of experts and identity experts on a mesh of eight devices against one device.

Shapes: B sequences, S their length, T tokens, D hidden, F expert width, E experts, Z identity
experts, K activated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, DispatchConfig, ExpertConfig, MoEConfig, replace
from dsmoe_jax.moe import experts, kernels, reference
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routed import routed_experts
from dsmoe_jax.moe.types import MoEInputs, Routing
from dsmoe_jax.nn.feed_forward import form_of

T, D, F, E, Z, K = 48, 8, 8, 8, 4, 3
AXES = ("data", "fsdp", "expert", "tensor")
FORM = ExpertConfig("gpt_oss", limit=0.8)


def set_mesh(*sizes):
    auto = (jax.sharding.AxisType.Auto,) * 4
    return jax.set_mesh(jax.make_mesh(sizes, AXES, axis_types=auto))


@functools.cache
def arrays():
    """x_TD, gates_TK, ids_TK (some unassigned), weights with biases, and dy_TD."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    shapes = ((E, F, D), (E, F, D), (E, D, F), (E, F), (E, F), (E, D))
    weights = experts.ExpertWeights(*(normal(*shape) for shape in shapes))
    ids_TK = np.stack([rng.choice(E, K, replace=False) for _ in range(T)])
    ids_TK = np.where(rng.random((T, K)) < 0.3, E, ids_TK).astype(np.int32)
    gates_TK = np.where(ids_TK < E, normal(T, K), 0)
    return normal(T, D), gates_TK, ids_TK, weights, normal(T, D)


def with_gradients(routed):
    """The output, and its gradients to x, gates and all weights."""
    x_TD, gates_TK, ids_TK, weights, dy_TD = arrays()

    @jax.jit
    def run(x_TD, gates_TK, weights, ids_TK, dy_TD):
        def layer(x_TD, gates_TK, weights):
            return routed(x_TD, Routing(ids_TK, gates_TK, None), weights)

        y_TD, pull = jax.vjp(layer, x_TD, gates_TK, weights)
        return y_TD, pull(dy_TD)

    return jax.device_get(run(x_TD, gates_TK, weights, ids_TK, dy_TD))


def by_formula(x_TD, routing, weights):
    """One dense loop of gpt-oss's experts."""

    def expert(u, gate, up, down, gate_bias, up_bias, down_bias):
        g = jnp.minimum(u @ gate.T + gate_bias, 0.8)
        v = jnp.clip(u @ up.T + up_bias, -0.8, 0.8)
        return (g / (1 + jnp.exp(-1.702 * g)) * (v + 1)) @ down.T + down_bias

    return reference.moe_layer(x_TD, routing, weights, expert=expert)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("name", "backend", "sizes"),
    [
        ("all_to_all", "ragged_dot", (1, 2, 2, 2)),
        ("fixed_slots", "loop", (2, 1, 2, 2)),
        ("all_gather", "ragged_dot", (1, 1, 4, 2)),
    ],
)
def test_biases_are_added_once(name, backend, sizes):
    """Whatever is split: the sums over F over `tensor`, the gradients over everything else."""
    moe = MoEConfig(
        E, 0, num_experts_per_tok=K, moe_intermediate_size=F, dispatch=DispatchConfig(name),
        expert=FORM, expert_backend=backend,
    )  # fmt: skip
    assert form_of(moe.expert).biases
    wanted = with_gradients(by_formula)
    with set_mesh(*sizes):
        found = with_gradients(lambda *args: routed_experts(*args, moe, kernels.JAX_ROWS)[0])
    paths = jax.tree.leaves_with_path(wanted)
    for (path, value), got in zip(paths, jax.tree.leaves(found), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-4, err_msg=where)


@pytest.mark.eight_devices
def test_identity_experts_are_on_no_device():
    """Output, gradients, ledger and recorded routing are those of one device."""
    keys = {
        "n_routed_experts": E, "n_identity_experts": Z, "num_experts_per_tok": K,
        "moe_intermediate_size": F, "expert_groups": 4, "balance.device.factor": 0.1,
        "drop.capacity_factor": 0.8, "drop.policy": "device", "expert_backend": "loop",
    }  # fmt: skip
    moe = replace(Config(), **{f"model.moe.{key}": value for key, value in keys.items()}).model.moe
    layer = MoELayer(moe, hidden_size=D, vocab_size=9, initializer_range=0.4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x_BSD, dy_BSD = np.random.default_rng(0).standard_normal((2, 8, 6, D), np.float32)
    rng = jax.random.key_data(jax.random.key(0))
    params, rng = jax.device_get((params, rng))

    def run():
        @jax.jit
        def step(params, x_BSD, rng):
            def apply(params, x_BSD):
                valid_BS = jnp.ones((8, 6), bool)
                inputs = MoEInputs(
                    valid_BS.astype(jnp.int32), valid_BS, jax.random.wrap_key_data(rng)
                )
                y_BSD, report = nnx.merge(graph, params)(x_BSD, inputs)
                return y_BSD, report

            y_BSD, pull, report = jax.vjp(apply, params, x_BSD, has_aux=True)
            logged = report.logged._replace(dispatch=None)
            return y_BSD, pull(dy_BSD), logged, report.recorded, report.loss_inputs

        return jax.device_get(step(params, x_BSD, rng))

    wanted = run()
    assert wanted[2].ledger.dropped_E.sum() > 0
    assert wanted[2].identity_Z.sum() > 0
    with set_mesh(1, 2, 4, 1):
        found = run()
    for (path, value), got in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=where)
