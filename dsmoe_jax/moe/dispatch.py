"""Dispatch: moves token rows to their experts and brings the results back.

A dispatcher owns no parameters and knows neither how experts are chosen nor how they compute.  A
new one is a function `(x_TD, routing, n_experts, run_experts) -> y_TD` and a line in
`DISPATCHERS`.

Shapes: T tokens, D hidden, E routed experts, K activated per token, N = T*K assignments.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.types import Routing, count_load

# (rows_ND grouped by expert, group_sizes_E) -> rows_ND
RunExperts = Callable[[jax.Array, jax.Array], jax.Array]


def local(x_TD: jax.Array, routing: Routing, n_experts: int, run_experts: RunExperts) -> jax.Array:
    """Everything on one shard: sort the N assignments by expert, compute, weigh, add up.

    Nothing is dropped.  The sort is stable, so equal inputs give equal bits.
    """
    t, k = routing.ids_TK.shape
    expert_N = routing.ids_TK.reshape(-1)
    order_N = jnp.argsort(expert_N, stable=True)  # sorted row -> assignment
    rank_TK = jnp.argsort(order_N).reshape(t, k)  # assignment -> sorted row
    group_sizes_E = count_load(routing.ids_TK, n_experts).astype(jnp.int32)
    rows_ND = gather_tokens(x_TD, order_N // k, rank_TK)
    out_ND = run_experts(rows_ND, group_sizes_E)
    return combine_rows(out_ND, routing.gates_TK, rank_TK, order_N)


@jax.custom_vjp
def gather_tokens(x_TD: jax.Array, token_N: jax.Array, rank_TK: jax.Array) -> jax.Array:
    """`x_TD[token_N]`: each token's row once per expert that it goes to.

    Its transpose would be a scatter-add, slow on every platform and in no fixed order; since we
    know where each token's K copies went (`rank_TK`), the gradient is a gather and a sum over K.
    """
    del rank_TK
    return x_TD[token_N]


def _gather_tokens_fwd(x_TD, token_N, rank_TK):
    return x_TD[token_N], rank_TK


def _gather_tokens_bwd(rank_TK, dy_ND):
    dx_TD = dy_ND[rank_TK].sum(axis=1, dtype=jnp.float32).astype(dy_ND.dtype)
    return dx_TD, None, None


gather_tokens.defvjp(_gather_tokens_fwd, _gather_tokens_bwd)


@jax.custom_vjp
def combine_rows(
    out_ND: jax.Array, gates_TK: jax.Array, rank_TK: jax.Array, order_N: jax.Array
) -> jax.Array:
    """Adds each token's K expert outputs, weighted by its gates (V1 eq. 9), in float32.

    Returns:
      y_TD in the dtype of `out_ND`.
    """
    del order_N
    rows_TKD = out_ND[rank_TK]
    y_TD = jnp.einsum("tkd,tk->td", rows_TKD, gates_TK, preferred_element_type=jnp.float32)
    return y_TD.astype(out_ND.dtype)


def _combine_rows_fwd(out_ND, gates_TK, rank_TK, order_N):
    return combine_rows(out_ND, gates_TK, rank_TK, order_N), (out_ND, gates_TK, rank_TK, order_N)


def _combine_rows_bwd(saved, dy_TD):
    out_ND, gates_TK, rank_TK, order_N = saved
    k = gates_TK.shape[1]
    dgates_TK = jnp.einsum("tkd,td->tk", out_ND[rank_TK], dy_TD, preferred_element_type=jnp.float32)
    gates_N = gates_TK.reshape(-1)[order_N]
    dout_ND = dy_TD[order_N // k].astype(jnp.float32) * gates_N[:, None]
    return dout_ND.astype(out_ND.dtype), dgates_TK.astype(gates_TK.dtype), None, None


combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)


DISPATCHERS: dict[str, Callable[..., jax.Array]] = {"local": local}


def get_dispatcher(name: str) -> Callable[..., jax.Array]:
    """The dispatcher of that name.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in DISPATCHERS:
        raise ValueError(f"model.moe.dispatch={name!r}: must be one of {sorted(DISPATCHERS)}")
    return DISPATCHERS[name]
