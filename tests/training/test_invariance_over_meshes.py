"""The gradient of every balance term at a fixed scope is the same on all meshes of eight devices.

Two MoE layers, one after the other, so that the terms of the second reach back through the experts
and the dispatch of the first.  One compiled function a mesh has every term in all scopes; their
weights are arguments, so that each term's gradient is seen by itself.

Shapes: B sequences, S positions, D hidden.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.config.mesh import AXES, MeshConfig
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs, RouterInputs
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import make_mesh
from tests.tools.trees import REORDERED, assert_all_below

B, S, D = 8, 12, 16
TERMS = [(scope, term) for term, line in losses.TERMS.items() for scope in line.scopes]
LAYERS = {
    "model.moe.n_routed_experts": 8,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.router.n_group": 4,
    "model.moe.router.topk_group": 2,
    "model.moe.router.group_score": "top2_sum",  # so that the best scores are not all chosen
    "model.moe.expert_groups": 4,
    "model.moe.moe_intermediate_size": 8,
    "model.moe.expert_backend": "loop",
}
# How 2 x 2 x 2 can be dealt to the axes but `stage`, of which test_pipelined_steps.py is: each of
# them alone, all pairs both ways, all threes.
MESHES = [
    dict(zip(AXES[1:], sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES[1:]))
    if np.prod(sizes) == 8
]


def mesh_name(sizes: dict[str, int]) -> str:
    """The axes that are split: "fsdp 2 x expert 4"."""
    return " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1)


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens with much in common, and their documents; two sequences have padding.

    So the load is uneven: with f near 1 little of a gradient is left but rounding.
    """
    rng = np.random.default_rng(0)
    x_BSD = rng.standard_normal((B, S, D)) + 2 * rng.standard_normal(D)
    segment_ids_BS = np.ones((B, S), np.int32)
    segment_ids_BS[::2, 3:] = 2
    segment_ids_BS[1, 5:] = segment_ids_BS[6] = 0
    return x_BSD.astype(np.float32), segment_ids_BS


def make_loss(graph: nnx.GraphDef):
    """`(params, x_BSD, segment_ids_BS, weights) -> weighted sum of the terms of both layers`."""
    devices = losses.Devices(n=4, limit=2)

    def loss(params, x_BSD, segment_ids_BS, weights):
        whole, total = losses.whole_batch(segment_ids_BS), 0.0
        valid_BS = segment_ids_BS > 0
        for state in params:
            x_BSD = sharding.constrain(x_BSD, "BSD")
            layer: MoELayer = nnx.merge(graph, state)
            inputs = MoEInputs(jnp.zeros(valid_BS.shape, jnp.int32), valid_BS)
            by_token = RouterInputs(inputs.token_ids_BS.reshape(-1), valid_BS.reshape(-1))
            routing, _ = layer.route(x_BSD.reshape(-1, D), by_token)
            for weight, (scope, term) in zip(weights, TERMS, strict=True):
                part = losses.sums(term, routing, segment_ids_BS, scope, devices)
                total += weight * losses.value(term, part, whole)
            x_BSD += layer(x_BSD, inputs)[0]
        return total

    return loss


@functools.cache
def two_layers() -> tuple[nnx.GraphDef, list]:
    """The graph of a layer, and the parameters of two."""
    moe = replace(Config(), **LAYERS).model.moe
    sizes = {"hidden_size": D, "vocab_size": 1, "initializer_range": 0.15}
    layers = [nnx.split(MoELayer(moe, **sizes, rngs=nnx.Rngs(seed))) for seed in range(2)]
    return layers[0][0], [jax.tree.map(np.asarray, state) for _, state in layers]


def gradients(sizes: dict[str, int]) -> dict[tuple[str, str], list[np.ndarray]]:
    """By scope and term, the gradients of both layers' parameters and of the tokens."""
    graph, params = two_layers()
    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), devices)):
        params = jax.tree.map(jax.device_put, params, sharding.shardings(params))
        rows = sharding.local_rows(B)
        x_BSD, segment_ids_BS = batch()
        arrays = sharding.global_batch({"x": x_BSD, "segments": segment_ids_BS}, rows, B)
        grad = jax.jit(jax.grad(make_loss(graph), argnums=(0, 1)))
        found = {}
        for name, weights in zip(TERMS, np.eye(len(TERMS), dtype=np.float32), strict=True):
            leaves = jax.tree.leaves(grad(params, arrays["x"], arrays["segments"], weights))
            found[name] = [np.asarray(x, np.float64) for x in leaves]
    return found


@functools.cache
def on_one_device() -> dict[tuple[str, str], list[np.ndarray]]:
    """Gradients on one device."""
    return gradients(dict.fromkeys(AXES, 1))


def test_all_meshes_are_there():
    assert len(MESHES) == 20, "ways to deal 2 x 2 x 2 to four axes"


@pytest.mark.eight_devices
@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
def test_gradients_on_a_mesh(sizes):
    """The error is that of the array that differs most."""
    wanted, errors = on_one_device(), {}
    for term, found in gradients(sizes).items():
        pairs = list(zip(found, wanted[term], strict=True))
        # The last layer's experts come after the last router, so they have no gradient.
        moved = [(x, y) for x, y in pairs if np.linalg.norm(y) > 0]
        assert len(moved) >= 7, (term, len(moved))  # router twice, experts once, tokens, ...
        assert all(not x.any() for x, y in pairs if not y.any())
        errors[term] = max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in moved)
    assert len(errors) == 3 * len(losses.TERMS) - 1
    assert_all_below(errors, REORDERED)
