"""Routers in which each token chooses the experts with the largest scores.

    logits --> scores s (softmax or sigmoid) --> [+ bias] --> [best groups only] --> top K --> ids
                        s of the chosen ones --> gates

The bias and the group limit change which experts are chosen, never the gate of a chosen one.

Shapes: T tokens, E routed experts, K activated per token, G groups, M groups a token may use.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dsmoe_jax.config import RouterConfig
from dsmoe_jax.moe.kernels import rows
from dsmoe_jax.moe.routers.settings import RouterSettings
from dsmoe_jax.moe.types import RouterInputs, Routing, unassign

SUB_EXPERTS = 4  # logits that the dynamic specialised router has for each expert


def topk(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """The K experts with the largest scores (V1 eqs. 9-11; V3 eqs. 12-16).

    The gates are the scores themselves, as in V1; with `norm_topk_prob` they are renormalised to
    sum to one.  Ties go to the expert with the lower index.  With K = 1 this is Switch
    (2101.03961 eq. 2).
    """
    return _from_scores(scores(logits_TE, settings.config), logits_TE, inputs, settings)


def gshard(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """Top-2 whose second expert may be left out at random in training (2006.16668 algorithm 1).

    With `random_second_expert` the second one is kept with probability min(1, 2 g2 / (g1 + g2)):
    in proportion to its gate.  GShard's own gates are those with `norm_topk_prob`.
    """
    routing = topk(logits_TE, inputs, settings)
    if not settings.option("random_second_expert") or inputs.rng is None:
        return routing
    share_T = routing.gates_TK[:, 1] / routing.gates_TK.sum(axis=1)
    kept_T = 2.0 * share_T > inputs.draw(jax.random.uniform)
    kept_TK = jnp.stack([jnp.ones_like(kept_T), kept_T], axis=1)
    return unassign(routing, kept_TK, settings.n_experts)


def noisy_topk(logits: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """Top-k of logits with noise of a learned scale (1701.06538 eqs. 3-5).

        H = x W_g + StandardNormal * softplus(x W_noise)

    The paper's gates, a softmax over the K kept, are those with `norm_topk_prob`.

    Args:
      logits: (T, 2E), x W_g beside x W_noise.
      inputs: without an rng (evaluation) there is no noise.
      settings: of the layer's router.
    """
    logits_TE, scale_TE = jnp.split(logits, 2, axis=1)
    if inputs.rng is not None:
        noise_TE = inputs.draw(jax.random.normal, settings.n_experts)
        logits_TE = logits_TE + noise_TE * jax.nn.softplus(scale_TE)
    return topk(logits_TE, inputs, settings)


def dynamic_specialised(
    logits: jax.Array, inputs: RouterInputs, settings: RouterSettings
) -> Routing:
    """Every expert has 4 sub-expert logits; its score is their share of one softmax over all 4E.

    The blog that proposes it prints a softmax over each expert's own 4 and then their mean, which
    is 1/4 for every expert and token and routes nothing (a test shows it); this is the reading
    that works.

    Args:
      logits: (T, 4E), the 4 of an expert side by side.
      inputs, settings: as for `topk`.
    """
    shares = jax.nn.softmax(logits, axis=-1)
    s_TE = shares.reshape(-1, settings.n_experts, SUB_EXPERTS).sum(axis=-1)
    return _from_scores(s_TE, logits, inputs, settings)


def replay_ids(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """The recorded experts in training, with gates from the router's own scores.

    The router still learns the gates, but not the choice.  In evaluation it chooses as `topk` does.
    """
    if inputs.rng is None:
        return topk(logits_TE, inputs, settings)
    assert inputs.replayed is not None, "nothing to replay"
    s_TE = scores(logits_TE, settings.config)
    ids_TK = inputs.replayed.ids
    # Unassigned ones, past the last expert, have gate 0.
    s_TK = jnp.take_along_axis(s_TE, ids_TK, axis=1, mode="fill", fill_value=0.0)
    return Routing(
        ids_TK, gates(s_TK, settings.config), affinities(s_TE, settings.config), logits_TE
    )


def first_bias(settings: RouterSettings) -> dict[str, jax.Array]:
    """The loss-free balance bias b of each expert, 0 at the start; nothing without a speed."""
    if settings.config.bias_update_speed is None:
        return {}
    return {"bias_E": jnp.zeros((settings.n_experts,), jnp.float32)}


def move_bias(
    state: Mapping[str, jax.Array], load_LE: jax.Array, settings: RouterSettings
) -> dict[str, jax.Array]:
    """Loss-free balancing: `b_i += gamma * sign(mean load - load_i)` (2408.15664 algorithm 1).

    Args:
      state: `bias_E` with a leading layer axis L; nothing without a speed.
      load_LE: assignments of the whole global batch.
      settings: with gamma, `bias_update_speed`.
    """
    speed = settings.config.bias_update_speed
    if speed is None:
        return {}
    below_LE = jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    return {"bias_E": state["bias_E"] + speed * below_LE}


def scores(logits_TE: jax.Array, config: RouterConfig) -> jax.Array:
    """Scores s_TE of the experts by `scoring_func`."""
    if config.scoring_func == "softmax":
        return jax.nn.softmax(logits_TE, axis=-1)
    return jax.nn.sigmoid(logits_TE)


def affinities(s_TE: jax.Array, config: RouterConfig) -> jax.Array:
    """The scores as a distribution over the experts: s' of V3 eq. 19."""
    return s_TE if config.scoring_func == "softmax" else _normalised(s_TE)


def gates(s_TK: jax.Array, config: RouterConfig) -> jax.Array:
    """Gates of the chosen experts from their scores: V1 eq. 10, V3 eqs. 13 and 14."""
    if config.norm_topk_prob:
        s_TK = _normalised(s_TK)
    return s_TK * config.routed_scaling_factor


def _normalised(s_TX: jax.Array) -> jax.Array:
    """Scores divided by their sum."""
    # Sigmoids may all underflow to 0, hence the tiny summand; the gradient divides by its square.
    return s_TX / (s_TX.sum(axis=-1, keepdims=True) + 1e-18)


def limit_to_groups(choice_TE: jax.Array, config: RouterConfig) -> jax.Array:
    """Leaves each token the experts of its M best groups; the others become -inf.

    V2 (device-limited) scores a group by its best expert, V3 (node-limited) by the sum of its two
    best.
    """
    t, e = choice_TE.shape
    by_group = choice_TE.reshape(t, config.n_group, e // config.n_group)
    best = 1 if config.group_score == "max" else 2
    score_TG = jax.lax.top_k(by_group, best)[0].sum(axis=-1)
    _, group_TM = jax.lax.top_k(score_TG, config.topk_group)
    kept_TG = (group_TM[:, :, None] == jnp.arange(config.n_group)).any(axis=1)
    # -inf and not 0: a biased score may be negative, and 0 would beat it.
    return jnp.where(kept_TG[:, :, None], by_group, -jnp.inf).reshape(t, e)


def mask_best(choice_TE: jax.Array, n: int) -> jax.Array:
    """Masks each token's n best experts with -inf (V1 figure 4)."""
    _, best_Tn = rows.top_k(choice_TE, n)
    masked_TE = (best_Tn[:, :, None] == jnp.arange(choice_TE.shape[1])).any(axis=1)
    return jnp.where(masked_TE, -jnp.inf, choice_TE)


def _from_scores(s_TE, logits, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    config = settings.config
    biased = "bias_E" in inputs.state
    limited = config.topk_group < config.n_group
    choice_TE = s_TE
    if biased:
        choice_TE = choice_TE + jax.lax.stop_gradient(inputs.state["bias_E"])
    if limited:
        choice_TE = limit_to_groups(choice_TE, config)
    if settings.mask_best:
        choice_TE = mask_best(choice_TE, settings.mask_best)
    s_TK, ids_TK = settings.top_k(choice_TE, settings.k)
    if biased or limited:  # the gates are of the plain scores
        s_TK = jnp.take_along_axis(s_TE, ids_TK, axis=1)
    return Routing(ids_TK, gates(s_TK, config), affinities(s_TE, config), logits)
