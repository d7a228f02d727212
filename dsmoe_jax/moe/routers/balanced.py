"""Routers that fill the experts evenly: by balancing the scores, or by letting experts choose.

Shapes: T tokens, E routed experts, K activated per token, C tokens an expert chooses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.routers import scored
from dsmoe_jax.moe.routers.settings import RouterSettings
from dsmoe_jax.moe.types import RouterInputs, Routing


def sinkhorn(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """The K best experts, in training after Sinkhorn's balancing (2202.01169 section 3; cf. BASE).

    The T x E matrix exp(logits) is scaled until every token and every expert has its fair share.
    The scaled matrix decides the choice, the plain scores the gates; no gradient flows through the
    scaling.  Rounding to K experts a token leaves some imbalance.  In evaluation the plain scores
    decide both, since balancing would let tokens see later ones.
    """
    if inputs.rng is None:
        return scored.topk(logits_TE, inputs, settings)
    config = settings.config
    found = scored.scores(logits_TE, config)
    iterations = settings.option("iterations")
    choice_TE = balance(jax.lax.stop_gradient(logits_TE), inputs.valid_T, iterations)
    _, ids_TK = settings.top_k(choice_TE, settings.k)
    gates_TK = scored.gates(found, ids_TK, config)
    best_TK = scored.best(found, settings)
    return Routing(ids_TK, gates_TK, found.affinity_TE, logits_TE, best_TK=best_TK)


def balance(logits_TE: jax.Array, valid_T: jax.Array | None, iterations: int) -> jax.Array:
    """Sinkhorn-Knopp in logarithms: each token sums to 1, each expert to T/E of the valid tokens.

    Returns:
      log of the scaled matrix, (T, E); rows of padding are scaled like the others but count
      nowhere.
    """
    ignored_T1 = jnp.zeros((len(logits_TE), 1))
    if valid_T is not None:
        ignored_T1 = jnp.where(valid_T, 0.0, -jnp.inf)[:, None]

    def iteration(_, x_TE):
        # A row of padding is left out of the sums over tokens; the constant T/E does not matter
        # to the order of a token's experts.
        x_TE = x_TE - jax.nn.logsumexp(x_TE + ignored_T1, axis=0, keepdims=True)
        return x_TE - jax.nn.logsumexp(x_TE, axis=1, keepdims=True)

    return jax.lax.fori_loop(0, iterations, iteration, logits_TE)


def expert_choice(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """Each expert takes the C = n K / E tokens with the largest scores (2202.09368 section 3.2).

    n are the valid tokens.

    The load is even by construction; a token may get no expert or many, K on average.

    In a causal language model this LEAKS THE FUTURE: whether an expert takes a token depends on
    the later tokens that compete for its places.  Losses of such a model are not comparable with
    those of the others, and it generates worse text than its loss suggests.

    The tokens of a micro-batch compete.  A routing has E columns here instead of K, most of them
    unassigned, so that memory for rows is E / K times the usual.
    """
    config = settings.config
    t, e = logits_TE.shape
    found = scored.scores(logits_TE, config)
    s_TE = found.s_TE
    rank_TE = scored.leave_out(found.order_TE, inputs.left_out_E)
    if inputs.valid_T is not None:
        rank_TE = jnp.where(inputs.valid_T[:, None], rank_TE, -jnp.inf)
    n = t if inputs.valid_T is None else inputs.valid_T.sum()
    _, token_EC = jax.lax.top_k(rank_TE.T, min(t, -(-t * settings.k // e)))
    taken_C = jnp.arange(token_EC.shape[1]) < -(-n * settings.k // e)
    taken_TE = jnp.zeros((t, e), bool).at[token_EC, jnp.arange(e)[:, None]].set(taken_C)
    taken_TE &= rank_TE > -jnp.inf
    best_first, ids_TE = jax.lax.top_k(jnp.where(taken_TE, s_TE, -1.0), e)
    taken_TE = best_first >= 0
    gates_TE = jnp.where(taken_TE, best_first, 0.0) * config.routed_scaling_factor
    ids_TE = jnp.where(taken_TE, ids_TE, e)
    return Routing(ids_TE, gates_TE, found.affinity_TE, logits_TE)
