"""BASE: every expert gets the same number of tokens, at the largest total affinity there is.

Shapes: T tokens, E routed experts, N = T + E tokens and dummies.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.capacity import rank_in_group
from dsmoe_jax.moe.routers import scored
from dsmoe_jax.moe.types import RouterInputs, Routing

PRECISION = 1e-4  # of the auction: its last epsilon, as a share of the spread of the affinities
FREE = -1  # the expert of a token that has none yet


def base(logits_TE: jax.Array, inputs: RouterInputs, config: MoEConfig) -> Routing:
    """Balanced assignment in training, the best expert in evaluation (2103.16716 section 3).

    The gate is sigmoid(u . e), the affinity that is maximised u . e itself.  The tokens that are
    assigned together are all that the layer sees at once.  In evaluation each token goes to its
    best expert, since an assignment would let tokens see later ones.
    """
    choice_TE = jax.lax.stop_gradient(logits_TE)
    ids_T = jnp.argmax(choice_TE, axis=1)
    if inputs.rng is not None:
        ids_T = assign(choice_TE, inputs.valid_T)
    gates_TK = jax.nn.sigmoid(jnp.take_along_axis(logits_TE, ids_T[:, None], axis=1))
    return Routing(
        ids_T[:, None].astype(jnp.int32),
        gates_TK * config.routed_scaling_factor,
        scored.scores(logits_TE, config),
        logits_TE,
    )


class _Auction(NamedTuple):
    """Who holds a place of which expert, at what bid, and what a place costs.

    Attributes:
      expert_N: int32, `FREE` for nobody's.
      bid_N: the bid by which the place is held.
      price_E: of the cheapest place.
    """

    expert_N: jax.Array
    bid_N: jax.Array
    price_E: jax.Array


def assign(affinity_TE: jax.Array, valid_T: jax.Array | None = None) -> jax.Array:
    """Auction algorithm for the assignment of 2103.16716 eqs. 2-3, by Bertsekas' epsilon scaling.

    In a round every free token bids for a place of the expert that is worth most to it after the
    price, as much as makes the second best as good, and a bit (epsilon) more.  An expert gives its
    places to the highest bids.  When no token is free the total is at most n epsilon below the
    largest.  Rounds with a large epsilon come first and make the prices for the next ones; the last
    epsilon is at most `PRECISION` times the largest spread of a token's affinities.

    Args:
      affinity_TE: what an expert is worth to a token; not a number counts as 0.
      valid_T: bool; the tokens to assign (None: all).  The others go to their best experts.

    Returns:
      ids_T, int32.  No expert gets more than ceil(n / E) of the n valid tokens.
    """
    (t, e), affinity_TE = affinity_TE.shape, jnp.clip(jnp.nan_to_num(affinity_TE), -1e30, 1e30)
    affinity_TE -= affinity_TE.max(axis=1, keepdims=True)  # changes nothing but the rounding
    valid_T = jnp.ones(t, bool) if valid_T is None else valid_T
    n = valid_T.sum()
    places = -(-n // e)
    # Dummies that do not care fill the last places, so that every place has its price.
    worth_NE = jnp.concatenate([jnp.where(valid_T[:, None], affinity_TE, 0.0), jnp.zeros((e, e))])
    bids_N = jnp.concatenate([valid_T, jnp.arange(e) < places * e - n])
    spread = jnp.maximum(worth_NE.max() - worth_NE.min(), 1e-6)
    nobody = _Auction(jnp.full(t + e, FREE, jnp.int32), jnp.zeros(t + e), jnp.zeros(e))

    def free_N(auction: _Auction) -> jax.Array:
        return bids_N & (auction.expert_N == FREE)

    def auction_with(state):
        epsilon, auction = state
        auction = jax.lax.while_loop(
            lambda a: free_N(a).any(),
            lambda a: _round(a, free_N(a), worth_NE, places, epsilon),
            nobody._replace(price_E=auction.price_E),
        )
        return epsilon / 4, auction

    _, auction = jax.lax.while_loop(
        lambda state: 4 * state[0] > spread * PRECISION, auction_with, (spread / 4, nobody)
    )
    best_T = jnp.argmax(affinity_TE, axis=1).astype(jnp.int32)
    return jnp.where(valid_T, auction.expert_N[:t], best_T)


def _round(a: _Auction, free_N, worth_NE, places, epsilon) -> _Auction:
    """The free tokens bid; the experts keep the highest bids."""
    e = worth_NE.shape[1]
    best_N2, wanted_N2 = scored.largest(worth_NE - a.price_E, min(e, 2))
    lead_N = best_N2[:, 0] - best_N2[:, -1]
    expert_N = jnp.where(free_N, wanted_N2[:, 0], a.expert_N)
    bid_N = jnp.where(free_N, a.price_E[wanted_N2[:, 0]] + lead_N + epsilon, a.bid_N)
    group_N = jnp.where(expert_N == FREE, e, expert_N)
    rank_N = rank_in_group(group_N[:, None], -bid_N[:, None], e)[:, 0]
    holds_NE = (group_N[:, None] == jnp.arange(e)) & (rank_N < places)[:, None]
    cheapest_E = jnp.where(holds_NE, bid_N[:, None], jnp.inf).min(axis=0)
    price_E = jnp.where(holds_NE.sum(axis=0) == places, cheapest_E, a.price_E)
    return _Auction(jnp.where(rank_N < places, expert_N, FREE), bid_N, price_E)
