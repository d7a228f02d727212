"""Run by test_invariance.py in a process with eight virtual devices: each term on each mesh.

Two MoE layers, one after the other, so that the terms of the second reach back through the experts
and the dispatch of the first.  One compiled function a mesh has every term in both scopes; their
weights are arguments, so that each term's gradient is seen by itself.

Shapes: B sequences, S positions, D hidden.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import Config, MoEConfig, replace
from dsmoe_jax.config.mesh import AXES, MeshConfig
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import RouterInputs
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import make_mesh

B, S, D = 8, 12, 16
SCOPES = ("sequence", "global_batch")
TERMS = [
    (scope, term)
    for term in losses.BALANCE_TERMS
    for scope in (("sequence",) if term == "sequence_balance" else SCOPES)
]
LAYERS = {
    "model.hidden_size": D,
    "model.initializer_range": 0.15,
    "model.moe.n_routed_experts": 8,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.router.n_group": 4,
    "model.moe.router.topk_group": 2,
    "model.moe.expert_groups": 4,
    "model.moe.moe_intermediate_size": 8,
    "model.moe.expert_backend": "loop",
}
# How 2 x 2 x 2 can be dealt to the four axes: each of them alone, all pairs both ways, all threes.
MESHES = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if np.prod(sizes) == 8
]


def of_scope(scope: str) -> MoEConfig:
    """The layers' config with that scope for all terms that have one."""
    names = (f"model.moe.{term}_scope" for term in losses.BALANCE_TERMS)
    scopes = {name: scope for name in names if "sequence_balance" not in name}
    return replace(Config(), **LAYERS, **scopes).model.moe


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens with much in common; two sequences have padding.

    So the load is uneven: with f near 1 little of a gradient is left but rounding.
    """
    rng = np.random.default_rng(0)
    x_BSD = rng.standard_normal((B, S, D)) + 2 * rng.standard_normal(D)
    valid_BS = np.ones((B, S), bool)
    valid_BS[1, 5:] = valid_BS[6] = False
    return x_BSD.astype(np.float32), valid_BS


def make_loss(graph: nnx.GraphDef):
    """`(params, x_BSD, valid_BS, weights) -> weighted sum of the terms of both layers`."""
    scopes = {scope: of_scope(scope) for scope in SCOPES}

    def loss(params, x_BSD, valid_BS, weights):
        whole, total = losses.whole(valid_BS), 0.0
        for state in params:
            x_BSD = sharding.constrain(x_BSD, "BSD")
            layer: MoELayer = nnx.merge(graph, state)
            token_ids_BS = jnp.zeros(valid_BS.shape, jnp.int32)
            inputs = RouterInputs(token_ids_BS.reshape(-1), valid_BS.reshape(-1))
            routing = layer.route(x_BSD.reshape(-1, D), inputs)
            for weight, (scope, term) in zip(weights, TERMS, strict=True):
                part = losses.part(term, routing, valid_BS, scopes[scope])
                total += weight * losses.value(term, part, whole)
            x_BSD += layer(x_BSD, token_ids_BS, valid_BS)[0]
        return total

    return loss


def gradients(sizes: dict[str, int], params, graph: nnx.GraphDef) -> dict[str, list[np.ndarray]]:
    """By scope and term, the gradients of both layers' parameters and of the tokens.

    Only of what has one: the last layer's experts come after the last router.
    """
    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), devices)):
        place = jax.tree.map(jax.device_put, params, sharding.shardings(params))
        rows = sharding.local_rows(B)
        x_BSD, valid_BS = batch()
        arrays = sharding.global_batch({"x": x_BSD, "valid": valid_BS}, rows, B)
        grad = jax.jit(
            jax.grad(make_loss(graph), argnums=(0, 1)),
            compiler_options={"xla_cpu_use_fusion_emitters": False},  # compiles in a third
        )
        found = {}
        for name, weights in zip(TERMS, np.eye(len(TERMS), dtype=np.float32), strict=True):
            leaves = jax.tree.leaves(grad(place, arrays["x"], arrays["valid"], weights))
            found[" ".join(name)] = [np.asarray(x, np.float64) for x in leaves]
    return found


def main() -> dict[str, dict[str, float]]:
    """The largest relative error of any array's gradient, by mesh and by term."""
    model = replace(Config(), **LAYERS).model
    graph, params = None, []
    for seed in range(2):
        graph, state = nnx.split(MoELayer(model, rngs=nnx.Rngs(seed)))
        params.append(jax.tree.map(np.asarray, state))
    assert graph is not None
    wanted, results = gradients(dict.fromkeys(AXES, 1), params, graph), {}
    for sizes in MESHES:
        name = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1)
        results[name] = {}
        for term, found in gradients(sizes, params, graph).items():
            pairs = list(zip(found, wanted[term], strict=True))
            moved = [(x, y) for x, y in pairs if np.linalg.norm(y) > 0]
            assert len(moved) >= 7, (term, len(moved))  # router twice, experts once, tokens, ...
            assert all(not x.any() for x, y in pairs if not y.any())
            results[name][term] = max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in moved)
    return results


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(main()))
