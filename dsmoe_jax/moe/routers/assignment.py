"""BASE: the assignment of equally many tokens to each expert with the largest total affinity.

Shapes: T tokens, E routed experts, N = T + E tokens and dummies.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.routers import scored
from dsmoe_jax.moe.routers.settings import RouterSettings
from dsmoe_jax.moe.types import RouterInputs, Routing, count_load

# For the first prices: how often the temperature is halved, and iterations at each.
COOLINGS = 10
ITERATIONS = 4


def base(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """Balanced assignment in training, the best expert in evaluation (2103.16716 section 3).

    The gate is sigmoid(u . e); the assignment maximises the sum of u . e over the tokens of a
    micro-batch.  In evaluation each token goes to its best expert, since an assignment would let
    tokens see later ones.
    """
    choice_TE = scored.leave_out(jax.lax.stop_gradient(logits_TE), inputs.left_out_E)
    ids_T = jnp.argmax(choice_TE, axis=1)
    if inputs.rng is not None:
        ids_T = assign(choice_TE, inputs.valid_T)
    gates_TK = jax.nn.sigmoid(jnp.take_along_axis(logits_TE, ids_T[:, None], axis=1))
    return Routing(
        ids_T[:, None].astype(jnp.int32),
        gates_TK * settings.config.routed_scaling_factor,
        scored.scores(logits_TE, settings.config).affinity_TE,
        logits_TE,
    )


class _Assignment(NamedTuple):
    """An assignment, and prices at which no token would gain by going to another expert.

    Attributes:
      expert_N: int32; E for unassigned rows.
      price_E: price of a place.
      gain_EE: [i, j], the largest gain, before prices, of a token of expert i by going to expert j
        (negative: the smallest loss); -inf if i has no token.
      load_E: int32, tokens of each expert.
    """

    expert_N: jax.Array
    price_E: jax.Array
    gain_EE: jax.Array
    load_E: jax.Array


def assign(affinity_TE: jax.Array, valid_T: jax.Array | None = None) -> jax.Array:
    """The balanced assignment with the largest total (2103.16716 eqs. 2-3), by cheapest chains.

    Every expert has a price, and every token is at the expert that is worth most to it after the
    price.  Of all assignments with the same loads this is the best one.  While an expert has more
    tokens than places, the cheapest chain of moves takes a token away from it: each move displaces
    a token of the next expert, up to an expert with a free place.  Then prices fall so that again
    no token would gain by moving.  The last assignment is therefore the best one, up to rounding,
    whatever the first prices were.  Good first prices leave few chains; there are never more chains
    than tokens.  (Successive shortest paths; the paper uses an auction.)

    Args:
      affinity_TE: worth of an expert to a token; NaN counts as 0.
      valid_T: bool; the tokens to assign (None: all).  The others go to their best experts.

    Returns:
      ids_T, int32.  No expert gets more than ceil(n / E) of the n valid tokens.
    """
    t, e = affinity_TE.shape
    affinity_TE = jnp.clip(jnp.nan_to_num(affinity_TE), -1e30, 1e30)
    affinity_TE -= affinity_TE.max(axis=1, keepdims=True)  # changes nothing but the rounding
    valid_T = jnp.ones(t, bool) if valid_T is None else valid_T
    n = valid_T.sum()
    places = jnp.maximum(-(-n // e), 1)
    # Dummies, to which all experts are worth the same, fill the last places of every expert.
    worth_NE = jnp.concatenate([affinity_TE, jnp.zeros((e, e))])
    real_N = jnp.concatenate([valid_T, jnp.arange(e) < places * e - n])
    price_E = _first_prices(jnp.where(real_N[:, None], worth_NE, -jnp.inf), places)
    expert_N = jnp.where(real_N, jnp.argmax(worth_NE - price_E, axis=1), e).astype(jnp.int32)
    gain_EE = jax.lax.map(lambda i: _gains(worth_NE, expert_N, i), jnp.arange(e))
    load_E = count_load(expert_N[:, None], e).astype(jnp.int32)
    last = jax.lax.while_loop(
        lambda a: (a.load_E > places).any(),
        lambda a: _move_chain(a, worth_NE, places),
        _Assignment(expert_N, price_E, gain_EE, load_E),
    )
    return jnp.where(valid_T, last.expert_N[:t], jnp.argmax(affinity_TE, axis=1).astype(jnp.int32))


def _first_prices(worth_NE: jax.Array, places: jax.Array) -> jax.Array:
    """Prices at which the loads are nearly even: Sinkhorn's balancing at falling temperatures."""
    real_N1 = worth_NE[:, :1] > -jnp.inf
    worth_NE = jnp.maximum(worth_NE, -1e38)
    spread = jnp.maximum(jnp.where(real_N1, -worth_NE, 0.0).max(), 1e-6)

    def iteration(i, price_E):
        # Every token is spread over the experts by softmax((worth - price) / temperature); the new
        # prices are those at which these loads would be even.
        temperature = spread / 4 * 0.5 ** (i // ITERATIONS)
        share_NE = jax.nn.log_softmax((worth_NE - price_E) / temperature, axis=1)
        load_E = jax.nn.logsumexp(jnp.where(real_N1, share_NE, -jnp.inf), axis=0)
        return price_E + temperature * (load_E - jnp.log(places))

    return jax.lax.fori_loop(0, COOLINGS * ITERATIONS, iteration, jnp.zeros(worth_NE.shape[1]))


def _gains(worth_NE: jax.Array, expert_N: jax.Array, i: jax.Array) -> jax.Array:
    """Row i of `gain_EE`."""
    gain_NE = worth_NE - jnp.take(worth_NE, i, axis=1)[:, None]
    return jnp.where((expert_N == i)[:, None], gain_NE, -jnp.inf).max(axis=0)


def _cheapest_chains(a: _Assignment, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best chains of moves from any overfull expert to each expert (Bellman-Ford).

    Returns:
      total_E: the sum of their gains after prices, at most 0; 0 for the overfull ones.
      before_E: the expert before it in the chain; -1 at its beginning.
    """
    step_EE = jnp.minimum(a.gain_EE - a.price_E + a.price_E[:, None], 0.0)  # > 0 is rounding

    def relax(state):
        total_E, before_E, _ = state
        via_EE = total_E[:, None] + step_EE
        better_E = via_EE.max(axis=0) > total_E
        before_E = jnp.where(better_E, via_EE.argmax(axis=0), before_E)
        return jnp.maximum(via_EE.max(axis=0), total_E), before_E, better_E.any()

    none_E = jnp.full(len(a.load_E), -1)
    first = jnp.where(a.load_E > places, 0.0, -jnp.inf), none_E, jnp.bool(True)
    return jax.lax.while_loop(lambda state: state[2], relax, first)[:2]


def _move_chain(a: _Assignment, worth_NE: jax.Array, places: jax.Array) -> _Assignment:
    """Makes the cheapest chain of moves to a free place, from its end to its start."""
    total_E, before_E = _cheapest_chains(a, places)
    end = jnp.argmax(jnp.where(a.load_E < places, total_E, -jnp.inf))
    price_E = a.price_E + jnp.maximum(total_E, total_E[end])

    def move(state):
        to, expert_N, gain_EE = state
        source = before_E[to]
        gain_N = jnp.take(worth_NE, to, axis=1) - jnp.take(worth_NE, source, axis=1)
        token = jnp.argmax(jnp.where(expert_N == source, gain_N, -jnp.inf))
        expert_N = expert_N.at[token].set(to)
        return source, expert_N, gain_EE.at[to].set(_gains(worth_NE, expert_N, to))

    start, expert_N, gain_EE = jax.lax.while_loop(
        lambda state: before_E[state[0]] >= 0, move, (end, a.expert_N, a.gain_EE)
    )
    gain_EE = gain_EE.at[start].set(_gains(worth_NE, expert_N, start))
    return _Assignment(expert_N, price_E, gain_EE, a.load_E.at[end].add(1).at[start].add(-1))
