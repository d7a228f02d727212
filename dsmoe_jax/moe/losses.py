"""Balance terms: pure functions of a routing, unweighted.

A new term is a function, a line in `BALANCE_TERMS` and, in `MoEConfig`, its weight `NAME_factor`,
its `NAME_scope` and its `NAME_schedule`.

Every term is a sum of products f P over groups of experts.  The loads f are counted, so they have
no gradient; the mean affinities P have.  Both are means over the valid tokens of a scope: each
sequence by itself (the term is then the mean over the sequences), or the global batch.  Each
balance term is exactly 1 for a uniform routing.

The batch may be computed in parts (micro-batches).  What a layer reports of a term is a `Part`;
the values of all parts add up to the term, and so do their gradients, because P is a sum over
tokens.  Only f of the global batch must be known before: then it is counted in a first pass.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token,
G groups of experts that a term balances (E, or the devices), L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig, Schedule
from dsmoe_jax.moe.types import Routing


class Factors(NamedTuple):
    """The two factors of a term, by token.

    Attributes:
      sent_TG: what a token sends to each group, scaled so that the mean f is 1 where all is even;
        None where f is 1 whatever the routing.
      affinity_TG: how much it leans to each group; their mean is P.
    """

    sent_TG: jax.Array | None
    affinity_TG: jax.Array


class Part(NamedTuple):
    """What a part of the batch contributes to a term; all are sums.

    Attributes:
      products: of f P over the sequences (scope `sequence`); None in scope `global_batch`.
      sent_G, affinity_G: over tokens (scope `global_batch`); None where there is none.
    """

    products: jax.Array | None
    sent_G: jax.Array | None
    affinity_G: jax.Array | None


class Whole(NamedTuple):
    """What the value of a part needs to know of the whole batch.

    Attributes:
      sequences: that have a valid token.
      tokens: valid ones.
      sent_LG: the sum of all parts' `sent_G` by term; None: the part is the whole.
    """

    sequences: jax.Array
    tokens: jax.Array
    sent_LG: dict[str, jax.Array] | None = None


def expert_balance(routing: Routing, config: MoEConfig) -> Factors:
    """Expert-level balance loss `sum_i f_i P_i` (V1 eqs. 12-14).

    f_i = E / (K T) * #{tokens that select i}, P_i = mean_t s_it.
    """
    del config
    chosen_TE = _chosen(routing)
    e, k = chosen_TE.shape[1], routing.ids_TK.shape[1]
    return Factors(chosen_TE * (e / k), _affinity(routing))


def sequence_balance(routing: Routing, config: MoEConfig) -> Factors:
    """Complementary sequence-wise loss: the expert loss of each sequence (V3 eqs. 17-20).

    As `expert_balance`, but its scope is always the sequence: so that the one may count load over
    the batch and the other over a sequence.
    """
    return expert_balance(routing, config)


def switch_balance(routing: Routing, config: MoEConfig) -> Factors:
    """Switch's load balancing loss `E sum_i f_i P_i` (2101.03961 eqs. 4-6).

    f_i is the share of the tokens whose first choice is i (for K > 1, GShard's l_aux times E).
    """
    del config
    affinity_TE = _affinity(routing)
    e = affinity_TE.shape[1]
    return Factors(jax.nn.one_hot(routing.ids_TK[:, 0], e) * e, affinity_TE)


def device_balance(routing: Routing, config: MoEConfig) -> Factors:
    """Device-level balance loss `sum_d f'_d P'_d` (V1 eqs. 15-17).

    f'_d is the mean of f_i over the experts of device d, P'_d the sum of their P_i.
    """
    d, k = config.expert_groups, routing.ids_TK.shape[1]
    sent_TG = _by_device(_chosen(routing), d).sum(axis=-1)
    return Factors(sent_TG * (d / k), _by_device(_affinity(routing), d).sum(axis=-1))


def communication_balance(routing: Routing, config: MoEConfig) -> Factors:
    """Communication balance loss `sum_d f''_d P''_d` (V2 eqs. 29-31).

    f''_d = D / (M T) * #{tokens that are sent to device d}: a token with three experts on a device
    travels there once.  M devices at most are reached by a token (`topk_group`, or K if fewer).
    """
    d, m = config.expert_groups, min(config.topk_group, routing.ids_TK.shape[1])
    sent_TG = _by_device(_chosen(routing), d).max(axis=-1)
    return Factors(sent_TG * (d / m), _by_device(_affinity(routing), d).sum(axis=-1))


def router_z(routing: Routing, config: MoEConfig) -> Factors:
    """Router z-loss `mean_t (log sum_i exp logits_ti)^2`, which keeps logits small (ST-MoE eq. 5).

    There is nothing to count: it is a mean over tokens, or of the sequences' means.
    """
    del config
    assert routing.logits_TE is not None, "the router has no logits"
    return Factors(None, jnp.square(jax.nn.logsumexp(routing.logits_TE, axis=-1))[:, None])


def _affinity(routing: Routing) -> jax.Array:
    assert routing.affinity_TE is not None, "the router has no affinities"
    return routing.affinity_TE


def _chosen(routing: Routing) -> jax.Array:
    """1 where a token selects an expert, (T, E)."""
    return jax.nn.one_hot(routing.ids_TK, _affinity(routing).shape[1]).sum(axis=1)


def _by_device(x_TE: jax.Array, devices: int) -> jax.Array:
    """The experts in equal groups: (T, devices, experts of a device)."""
    return x_TE.reshape(x_TE.shape[0], devices, -1)


BALANCE_TERMS: dict[str, Callable[[Routing, MoEConfig], Factors]] = {
    "expert_balance": expert_balance,
    "device_balance": device_balance,
    "communication_balance": communication_balance,
    "sequence_balance": sequence_balance,
    "switch_balance": switch_balance,
    "router_z": router_z,
}


def scope(name: str, config: MoEConfig) -> str:
    """The tokens over which a term is taken: "sequence" or "global_batch"."""
    return "sequence" if name == "sequence_balance" else getattr(config, f"{name}_scope")


def part(name: str, routing: Routing, valid_BS: jax.Array, config: MoEConfig) -> Part:
    """What these tokens contribute to a term.

    Args:
      name: of the term.
      routing: with affinities, of the T tokens.
      valid_BS: bool, False for padding, which counts nowhere.
      config: of the layer.
    """
    b, s = valid_BS.shape
    valid_BS1 = valid_BS.reshape(b, s, 1).astype(jnp.float32)
    sums = lambda x_TG: (x_TG.reshape(b, s, -1) * valid_BS1).sum(axis=1)  # noqa: E731
    sent_TG, affinity_TG = BALANCE_TERMS[name](routing, config)
    sent_BG = None if sent_TG is None else jax.lax.stop_gradient(sums(sent_TG))
    affinity_BG = sums(affinity_TG)
    if scope(name, config) == "global_batch":
        sent_G = None if sent_BG is None else sent_BG.sum(axis=0)
        return Part(None, sent_G, affinity_BG.sum(axis=0))
    tokens_B1 = jnp.maximum(valid_BS1.sum(axis=1), 1.0)  # a sequence of padding gives 0
    f_BG = 1.0 if sent_BG is None else sent_BG / tokens_B1
    return Part((f_BG * affinity_BG / tokens_B1).sum(), None, None)


def whole(valid_BS: jax.Array, sent_LG: dict[str, jax.Array] | None = None) -> Whole:
    """The `Whole` of a batch; `sent_LG` if it is computed in parts."""
    return Whole(
        jnp.maximum(valid_BS.any(axis=1).sum(dtype=jnp.float32), 1.0),
        jnp.maximum(valid_BS.sum(dtype=jnp.float32), 1.0),
        sent_LG,
    )


def value(name: str, part: Part, whole: Whole) -> jax.Array:
    """The share that a part has in a term's value; the shares of all parts add up to the term.

    Any leading (layer) axis of the part is kept.
    """
    if part.products is not None:
        return part.products / whole.sequences
    assert part.affinity_G is not None
    sent_G = part.sent_G
    if sent_G is not None and whole.sent_LG is not None:
        sent_G = whole.sent_LG[name]
    f_G = 1.0 if sent_G is None else sent_G / whole.tokens
    return (f_G * part.affinity_G / whole.tokens).sum(axis=-1)


def term(name: str, routing: Routing, valid_BS: jax.Array, config: MoEConfig) -> jax.Array:
    """The value of a term over a whole batch, float32 scalar."""
    return value(name, part(name, routing, valid_BS, config), whole(valid_BS))


def active_terms(config: MoEConfig) -> dict[str, float]:
    """The weight of every term that the config turns on."""
    weights = {name: getattr(config, f"{name}_factor") for name in BALANCE_TERMS}
    return {name: weight for name, weight in weights.items() if weight != 0.0}


def counted_terms(config: MoEConfig) -> list[str]:
    """The active terms whose loads are counted over the global batch."""
    return [
        name
        for name in active_terms(config)
        if scope(name, config) == "global_batch" and name != "router_z"
    ]


def weights_at(config: MoEConfig, share: jax.Array) -> dict[str, jax.Array]:
    """The weights of the active terms after a share of the run's steps: factor times schedule."""
    return {
        name: factor * _multiple(getattr(config, f"{name}_schedule"), share)
        for name, factor in active_terms(config).items()
    }


def _multiple(schedule: Schedule, share: jax.Array) -> jax.Array:
    if not schedule:
        return jnp.float32(1.0)
    shares, multiples = zip(*schedule, strict=True)
    multiples = multiples[0], *multiples, multiples[-1]  # constant outside, a jump counts at once
    return jnp.interp(share, jnp.array([-1.0, *shares, 2.0]), jnp.array(multiples))
