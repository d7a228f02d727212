"""The step of the self-check as one dense loop on one device: what should have come out.

Shapes: B sequences, S positions, T = B*S tokens, D hidden, K activated per token, E routed
experts, Z identity experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe import experts
from dsmoe_jax.moe.types import MoEInputs, RecordedRouting, RouterInputs, Routing, unassign
from dsmoe_jax.nn.feed_forward import form_of
from dsmoe_jax.training.self_check.on_mesh import legs_of
from dsmoe_jax.training.self_check.small_layer import Arrays, step_key


def step_on_one_device(graph: nnx.GraphDef, arrays: Arrays, moe: MoEConfig) -> Any:
    """`dy_BSD, recorded -> parts, ids_BSK`: the same as one dense loop, in float32.

    What the step on the mesh has dropped is dropped here: with a capacity for each part of the
    tokens that depends on the mesh.
    """

    def step(
        arrays: Arrays, dy_BSD: jax.Array, recorded: RecordedRouting
    ) -> tuple[dict[str, Any], jax.Array]:
        by_token = _by_token(arrays.inputs)
        valid_T1 = by_token.valid_T[:, None]  # pyright: ignore[reportOptionalSubscript]

        def apply(params: Any, x_BSD: jax.Array) -> Any:
            layer = nnx.merge(graph, params, arrays.other)
            x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
            routing, _ = layer.route(x_TD, by_token)
            kept_TK = recorded.ids.reshape(routing.ids_TK.shape) < moe.n_choices
            kept = unassign(routing, kept_TK, moe.n_choices)
            y_TD = dense_loop(x_TD, kept, layer.expert_weights(), moe)
            sent_TK = jnp.where(valid_T1, routing.ids_TK, moe.n_choices)
            return y_TD.reshape(x_BSD.shape), (sent_TK, kept.gates_TK)

        y_BSD, pull, routing = jax.vjp(apply, arrays.params, arrays.x_BSD, has_aux=True)
        dparams, dx_BSD = pull(dy_BSD)
        ids_BSK, gates_BSK = (x.reshape(*y_BSD.shape[:2], -1) for x in routing)
        return legs_of(y_BSD, dx_BSD, dparams, gates_BSK), ids_BSK

    compiled = jax.jit(step)
    in_float32 = arrays._replace(x_BSD=np.asarray(arrays.x_BSD, np.float32))

    def run(dy_BSD: Any, recorded: RecordedRouting) -> tuple[dict[str, Any], np.ndarray]:
        here = jax.default_device(jax.local_devices()[0])
        with here, jax.default_matmul_precision("highest"):
            return jax.device_get(compiled(in_float32, np.asarray(dy_BSD, np.float32), recorded))

    return run


def _by_token(inputs: MoEInputs) -> RouterInputs:
    """The router's inputs, with B and S as one axis."""

    def flat(x: Any) -> Any:
        return jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, *a.shape[2:]), x)

    return RouterInputs(
        flat(inputs.token_ids_BS),
        flat(inputs.valid_BS),
        step_key(),
        replayed=flat(inputs.replayed),
        sequence_ids_B=jnp.asarray(inputs.sequence_ids_B),
        task_ids_T=flat(inputs.task_ids_BS),
    )


def dense_loop(
    x_TD: jax.Array, routing: Routing, weights: experts.ExpertWeights, moe: MoEConfig
) -> jax.Array:
    """`reference.moe_layer` without shared experts, as a scan: 256 experts compile as fast as one.

    Args:
      x_TD: tokens.
      routing: of those tokens, in the ids of the router; unassigned ones have id E + Z.
      weights: of all experts, in the dtype of the tokens.
      moe: config of the layer.
    """
    activation = form_of(moe.expert).activation

    def gate_of(i: jax.Array | int) -> jax.Array:
        return jnp.where(routing.ids_TK == i, routing.gates_TK, 0.0).sum(axis=1)[:, None]

    @jax.checkpoint  # else the scan keeps every expert's rows of every token
    def one_more(y_TD: jax.Array, expert: tuple[jax.Array, experts.ExpertWeights]) -> Any:
        i, w = expert
        return y_TD + gate_of(i) * experts.one_expert_on(x_TD, w, activation), None

    y_TD = jnp.zeros_like(x_TD)
    y_TD, _ = jax.lax.scan(one_more, y_TD, (jnp.arange(moe.n_routed_experts), weights))
    for i in range(moe.n_routed_experts, moe.n_choices):
        y_TD += gate_of(i) * x_TD  # an identity expert
    return y_TD
