"""Balance terms: pure functions of a routing, unweighted.

A new term is a function, a line in `BALANCE_TERMS` and its weight `NAME_factor` in `MoEConfig`.
The layer computes the terms whose weight is not 0; the training step weighs and adds them.

Every balance term is a sum of products f P.  The loads f are counted, so they have no gradient;
the mean affinities P have.  Both are taken over a scope: each sequence by itself (the term is then
the mean over the sequences), or the whole batch.  Each is exactly 1 for a uniform routing.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token,
G scopes, D groups of experts (devices).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.types import Routing


def expert_balance(routing: Routing, valid_BS: jax.Array, config: MoEConfig) -> jax.Array:
    """Expert-level balance loss `sum_i f_i P_i` (V1 eqs. 12-14).

    f_i = E / (K T) * #{tokens that select i}, P_i = mean_t s_it, over the T valid tokens of the
    scope.

    Args:
      routing: with affinities.
      valid_BS: bool, False for padding, which counts nowhere.
      config: of the layer; its `balance_scope` is "sequence" or "global_batch".

    Returns:
      float32 scalar.
    """
    return _balance(
        _chosen(routing), routing.ids_TK.shape[1], routing, valid_BS, config.balance_scope
    )


def sequence_balance(routing: Routing, valid_BS: jax.Array, config: MoEConfig) -> jax.Array:
    """Complementary sequence-wise loss: the expert loss of each sequence (V3 eqs. 17-20).

    As `expert_balance`, whatever `balance_scope` says, so that one may count load over the batch
    and the other over a sequence.
    """
    del config
    return _balance(_chosen(routing), routing.ids_TK.shape[1], routing, valid_BS, "sequence")


def switch_balance(routing: Routing, valid_BS: jax.Array, config: MoEConfig) -> jax.Array:
    """Switch's load balancing loss `E sum_i f_i P_i` (2101.03961 eqs. 4-6).

    f_i is the share of the tokens whose first choice is i (for K > 1, GShard's l_aux times E).
    """
    first_TE = jax.nn.one_hot(routing.ids_TK[:, 0], _n_experts(routing))
    return _balance(first_TE, 1, routing, valid_BS, config.balance_scope)


def device_balance(routing: Routing, valid_BS: jax.Array, config: MoEConfig) -> jax.Array:
    """Device-level balance loss `sum_d f'_d P'_d` (V1 eqs. 15-17).

    f'_d is the mean of f_i over the experts of device d, P'_d the sum of their P_i.
    """
    e, k, d = _n_experts(routing), routing.ids_TK.shape[1], config.expert_groups
    sent_TD = _chosen(routing).reshape(-1, d, e // d).sum(axis=-1)
    return _balance(sent_TD, k, routing, valid_BS, config.balance_scope)


def communication_balance(routing: Routing, valid_BS: jax.Array, config: MoEConfig) -> jax.Array:
    """Communication balance loss `sum_d f''_d P''_d` (V2 eqs. 29-31).

    f''_d = D / (M T) * #{tokens that are sent to device d}: a token with three experts on a device
    travels there once.  M devices at most are reached by a token (`topk_group`, or K if fewer).
    """
    e, d = _n_experts(routing), config.expert_groups
    sent_TD = _chosen(routing).reshape(-1, d, e // d).max(axis=-1)
    limit = min(config.topk_group, routing.ids_TK.shape[1])
    return _balance(sent_TD, limit, routing, valid_BS, config.balance_scope)


def router_z(routing: Routing, valid_BS: jax.Array, config: MoEConfig) -> jax.Array:
    """Router z-loss `mean_t (log sum_i exp logits_ti)^2`, which keeps logits small (ST-MoE eq. 5).

    The mean is over the valid tokens of each sequence and then over the sequences, whatever the
    scope of the balance terms: so it is the same in any number of micro-batches, padding or not.
    """
    del config
    assert routing.logits_TE is not None, "the router has no logits"
    z_BS = jnp.square(jax.nn.logsumexp(routing.logits_TE, axis=-1)).reshape(valid_BS.shape)
    tokens_B = valid_BS.sum(axis=1)
    z_B = (z_BS * valid_BS).sum(axis=1) / jnp.maximum(tokens_B, 1)
    return z_B.sum() / jnp.maximum((tokens_B > 0).sum(), 1)


def _n_experts(routing: Routing) -> int:
    assert routing.affinity_TE is not None, "the router has no affinities"
    return routing.affinity_TE.shape[1]


def _chosen(routing: Routing) -> jax.Array:
    """1 where a token selects an expert, (T, E)."""
    return jax.nn.one_hot(routing.ids_TK, _n_experts(routing)).sum(axis=1)


def _balance(
    sent_TD: jax.Array, sends: int, routing: Routing, valid_BS: jax.Array, scope: str
) -> jax.Array:
    """`sum_d f_d P_d` by scope: f_d = D / (sends T) * sum_t sent_td, P_d = mean affinity for d.

    Args:
      sent_TD: what each token sends to each of D equal groups of experts (D = E: to each expert).
      sends: what one token sends in all, so that f is 1 for each group when all is even.
      routing, valid_BS: as for the terms.
      scope: "sequence" or "global_batch".
    """
    (b, s), n_groups = valid_BS.shape, sent_TD.shape[1]
    assert routing.affinity_TE is not None
    scopes = (b, s) if scope == "sequence" else (1, b * s)
    valid = valid_BS.reshape(*scopes, 1).astype(jnp.float32)
    tokens = jnp.maximum(valid.sum(axis=1), 1.0)  # of each scope; an all-padding one gives 0
    e = routing.affinity_TE.shape[1]
    sent_GD = (sent_TD.reshape(*scopes, n_groups) * valid).sum(axis=1)
    f_GD = sent_GD * n_groups / (sends * tokens)
    p_GE = (routing.affinity_TE.reshape(*scopes, e) * valid).sum(axis=1) / tokens
    p_GD = p_GE if n_groups == e else p_GE.reshape(-1, n_groups, e // n_groups).sum(axis=-1)
    per_scope = (jax.lax.stop_gradient(f_GD) * p_GD).sum(axis=-1)
    filled = valid.any(axis=(1, 2))
    return per_scope.sum() / jnp.maximum(filled.sum(), 1)


BALANCE_TERMS: dict[str, Callable[[Routing, jax.Array, MoEConfig], jax.Array]] = {
    "expert_balance": expert_balance,
    "device_balance": device_balance,
    "communication_balance": communication_balance,
    "sequence_balance": sequence_balance,
    "switch_balance": switch_balance,
    "router_z": router_z,
}


def active_terms(config: MoEConfig) -> dict[str, float]:
    """The weight of every term that the config turns on."""
    weights = {name: getattr(config, f"{name}_factor") for name in BALANCE_TERMS}
    return {name: weight for name, weight in weights.items() if weight != 0.0}
