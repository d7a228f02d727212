"""The MoE layer as the papers write it: one dense loop, every expert on every token.

Read this file first.  It is slow and complete: no sorting, no capacity, no devices.  Everything
else in this folder computes the same, faster or on many chips, and is tested against it.

Shapes: T tokens, D hidden, F expert width, E routed experts, K activated per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.types import Routing


def route(u_TD: jax.Array, router_ED: jax.Array, k: int) -> Routing:
    """The K experts of largest affinity, gates not renormalised (V1 eqs. 10 and 11)."""
    logits_TE = u_TD @ router_ED.T
    s_TE = jax.nn.softmax(logits_TE, axis=-1)  # s_it = softmax_i(u_t . e_i)
    gates_TK, ids_TK = jax.lax.top_k(s_TE, k)  # g_it = s_it for the K largest, else 0
    return Routing(ids_TK, gates_TK, s_TE, logits_TE)


def ffn(u_TD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array) -> jax.Array:
    """One expert, a SwiGLU (2002.05202): `down(silu(gate u) * up u)`."""
    return (jax.nn.silu(u_TD @ gate_FD.T) * (u_TD @ up_FD.T)) @ down_DF.T


def moe_layer(
    u_TD: jax.Array, routing: Routing, routed, shared=None, *, expert=ffn, n_identity: int = 0
) -> jax.Array:
    """Shared experts plus the gated sum of the routed ones, without the residual (V1 eq. 9).

        h_t = sum_{i <= Ks} FFN_i(u_t) + sum_i g_it FFN_i(u_t)

    Args:
      u_TD: the layer's input.
      routing: which experts each token goes to; unassigned ones have id E.
      routed: gate_EFD, up_EFD, down_EDF of the routed experts.
      shared: gate_FD, up_FD, down_DF of the shared experts, side by side as one wide FFN; None: no
        shared expert.
      expert: the function of an expert, of its input and weights.
      n_identity: experts after the routed ones that give back their input (LongCat-Flash).
    """
    h_TD = jnp.zeros_like(u_TD) if shared is None else expert(u_TD, *shared)
    e = len(routed[0])
    for i in range(e + n_identity):
        g_T = jnp.where(routing.ids_TK == i, routing.gates_TK, 0.0).sum(axis=1)
        one = [weight[i] for weight in jax.tree.leaves(routed)] if i < e else None
        h_TD += g_T[:, None] * (u_TD if one is None else expert(u_TD, *one))
    return h_TD
