"""Balance terms: pure functions of a routing, unweighted.

A new term is a function, a line in `BALANCE_TERMS` and its weight `NAME_factor` in `MoEConfig`.
The layer computes the terms whose weight is not 0; the training step weighs and adds them.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.types import Routing


def expert_balance(
    logits_TE: jax.Array, routing: Routing, valid_BS: jax.Array, scope: str
) -> jax.Array:
    """Expert-level balance loss `sum_i f_i P_i` (V1 eqs. 12-14); 1 for a uniform routing.

    f_i = E / (K T) * #{tokens that select i} carries no gradient, P_i = mean_t s_it does.  T are
    the valid tokens of the scope: of each sequence (then averaged over the sequences), or of the
    whole batch.

    Args:
      logits_TE: unused (the terms share one signature).
      routing: with affinities.
      valid_BS: bool, False for padding, which counts nowhere.
      scope: "sequence" or "global_batch".

    Returns:
      float32 scalar.
    """
    del logits_TE
    assert routing.affinity_TE is not None, "the router has no affinities"
    b, s = valid_BS.shape
    e, k = routing.affinity_TE.shape[1], routing.ids_TK.shape[1]
    scopes = (b, s) if scope == "sequence" else (1, b * s)
    valid = valid_BS.reshape(*scopes, 1).astype(jnp.float32)
    tokens = jnp.maximum(valid.sum(axis=1), 1.0)  # of each scope; an all-padding one gives 0
    chosen_TE = jax.nn.one_hot(routing.ids_TK, e).sum(axis=1)
    f = (chosen_TE.reshape(*scopes, e) * valid).sum(axis=1) * e / (k * tokens)
    p = (routing.affinity_TE.reshape(*scopes, e) * valid).sum(axis=1) / tokens
    per_scope = (jax.lax.stop_gradient(f) * p).sum(axis=-1)
    filled = valid.any(axis=(1, 2))
    return per_scope.sum() / jnp.maximum(filled.sum(), 1)


def router_z(logits_TE: jax.Array, routing: Routing, valid_BS: jax.Array, scope: str) -> jax.Array:
    """Router z-loss `mean_t (log sum_i exp logits_ti)^2`, which keeps logits small (ST-MoE eq. 5).

    The mean is over the valid tokens of the whole batch; `scope` does not change it.
    """
    del routing, scope
    z_T = jnp.square(jax.nn.logsumexp(logits_TE, axis=-1))
    valid_T = valid_BS.reshape(-1).astype(jnp.float32)
    return (z_T * valid_T).sum() / jnp.maximum(valid_T.sum(), 1.0)


BALANCE_TERMS: dict[str, Callable[[jax.Array, Routing, jax.Array, str], jax.Array]] = {
    "expert_balance": expert_balance,
    "router_z": router_z,
}


def active_terms(config: MoEConfig) -> dict[str, float]:
    """The weight of every term that the config turns on."""
    weights = {name: getattr(config, f"{name}_factor") for name in BALANCE_TERMS}
    return {name: weight for name, weight in weights.items() if weight != 0.0}
