"""Routers in which each token chooses the experts with the largest scores.

    logits --> scores s (`scores.SCORING`) --> [+ bias] --> [best groups only] --> top K --> ids
                        s of the chosen ones --> gates

The bias and the group limit change which experts are chosen, never the gate of a chosen one.
Gates and affinities are normalised from logarithms of the scores, and experts are ranked by logits
where nothing is added to the scores: see `scores`.

Shapes: T tokens, E routed experts, K activated per token, G groups, M groups a token may use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from dsmoe_jax.config import RouterConfig
from dsmoe_jax.moe.kernels import rows
from dsmoe_jax.moe.routers.scores import SCORING, Scores, scores, total
from dsmoe_jax.moe.routers.settings import RouterSettings
from dsmoe_jax.moe.schedules import Progress, multiple
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
    share_T = _shares(scores(logits_TE, settings.config), routing.ids_TK)[:, 1]
    kept_T = 2.0 * share_T > inputs.draw(jax.random.uniform)
    kept_TK = jnp.stack([jnp.ones_like(kept_T), kept_T], axis=1)
    # The balance terms count both choices: which of the second ones are left out is chance, and
    # f is even at 1 only if every token makes K choices.
    left = unassign(routing, kept_TK, settings.n_experts)
    return left._replace(chosen_TK=routing.ids_TK)


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
    by_expert = -1, settings.n_experts, SUB_EXPERTS
    s_TE = jax.nn.softmax(logits, axis=-1).reshape(by_expert).sum(axis=-1)
    log_TE = jax.nn.logsumexp(logits.reshape(by_expert), axis=-1)
    return _from_scores(Scores(s_TE, s_TE, log_TE), logits, inputs, settings)


def replay_ids(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """The recorded experts in training, with gates from the router's own scores.

    The router still learns the gates, but not the choice.  Gates are normalised over what the
    recorded router chose, whatever of it was left out or dropped.  In evaluation it chooses as
    `topk` does.
    """
    if inputs.rng is None:
        return topk(logits_TE, inputs, settings)
    assert inputs.replayed is not None, "nothing to replay"
    found = scores(logits_TE, settings.config)
    chosen_TK = inputs.replayed.chosen
    gates_TK = gates(found, chosen_TK, settings.config)
    best_TK = best(found, settings)
    routing = Routing(chosen_TK, gates_TK, found.affinity_TE, logits_TE, chosen_TK, best_TK)
    return unassign(routing, inputs.replayed.sent < settings.n_experts, settings.n_experts)


def token_table(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """The K experts of a fixed table, by token id; the gates are learned (V4's first MoE layers).

    The choice is nothing that a bias or a balance term could change: the router has neither.  How
    the table is built is `fixed.choices_from_counts`.
    """
    found = scores(logits_TE, settings.config)
    ids_TK = inputs.state["table_VK"][inputs.token_ids_T]
    none = jnp.finfo(jnp.float32).min
    rank_TK = jnp.take_along_axis(found.order_TE, ids_TK, axis=1, mode="fill", fill_value=none)
    _, place_TK = settings.top_k(jax.lax.stop_gradient(rank_TK), settings.k)
    ids_TK = jnp.take_along_axis(ids_TK, place_TK, axis=1)  # best first
    return Routing(ids_TK, gates(found, ids_TK, settings.config), found.affinity_TE, logits_TE)


def first_bias(settings: RouterSettings) -> dict[str, jax.Array]:
    """The loss-free balance bias b of each expert, 0 at the start; nothing without a speed."""
    if settings.config.bias_update_speed is None:
        return {}
    return {"bias_E": jnp.zeros((settings.n_experts,), jnp.float32)}


def move_bias(
    state: Mapping[str, jax.Array],
    load_LE: jax.Array,
    progress: Progress,
    settings: RouterSettings,
) -> dict[str, jax.Array]:
    """Loss-free balancing: `b_i += gamma * sign(mean load - load_i)` (2408.15664 algorithm 1).

    Args:
      state: `bias_E` with a leading layer axis L; nothing without a speed.
      load_LE: assignments of the whole global batch, fewer than 2^31 of them.  The bias of an
        identity expert stays as it is (LongCat-Flash, 2509.01322): with those of the others it is
        settled how many choices it gets.
      progress: of the run, for the schedule of gamma.
      settings: with gamma, `bias_update_speed`.
    """
    config = settings.config
    if config.bias_update_speed is None:
        return {}
    speed = config.bias_update_speed * multiple(config.bias_update_schedule, progress)
    moved_LE = speed * below_mean(load_LE)
    if settings.n_identity:
        is_routed_E = jnp.arange(settings.n_experts) < settings.n_experts - settings.n_identity
        moved_LE = jnp.where(is_routed_E, moved_LE, 0.0)
    return {"bias_E": state["bias_E"] + moved_LE}


def below_mean(load_LE: jax.Array) -> jax.Array:
    """Sign of mean load - load, float32: 0 exactly at the mean."""
    # In integers, since the mean is rarely a float32.  sum - E load has the same sign, but E load
    # may be above 2^31: so the mean's whole part is compared, and then its rest.
    load_LE = load_LE.astype(jnp.int32)
    mean_L1, rest_L1 = jnp.divmod(load_LE.sum(axis=-1, keepdims=True), load_LE.shape[-1])
    below_LE = jnp.sign(mean_L1 - load_LE)
    return jnp.where(below_LE == 0, jnp.sign(rest_L1), below_LE).astype(jnp.float32)


def gates(found: Scores, ids_TK: jax.Array, config: RouterConfig) -> jax.Array:
    """Gates of chosen experts: V1 eq. 10, V3 eqs. 13 and 14; 0 for unassigned ones."""
    if config.norm_topk_prob:
        return _shares(found, ids_TK) * config.routed_scaling_factor
    s_TK = jnp.take_along_axis(found.s_TE, ids_TK, axis=1, mode="fill", fill_value=0.0)
    return s_TK * config.routed_scaling_factor


def _shares(found: Scores, ids_TK: jax.Array) -> jax.Array:
    """Scores of chosen experts divided by their sum; 0 for unassigned ones."""
    # From logarithms, which are exact where all K scores vanish; so is the gradient, which would
    # otherwise divide by the square of their sum.  (Others add 1e-20 to the sum, which makes such
    # gates 0; this sum, relative to the largest score, is never below 1.)
    none = jnp.finfo(jnp.float32).min
    log_TK = jnp.take_along_axis(found.log_TE, ids_TK, axis=1, mode="fill", fill_value=none)
    share_TK = jax.nn.softmax(log_TK, axis=1)
    return jnp.where(ids_TK < found.log_TE.shape[1], share_TK, 0.0)


def best(found: Scores, settings: RouterSettings) -> jax.Array:
    """The K experts of the largest scores, whichever are chosen (V3 eq. 18)."""
    return settings.top_k(jax.lax.stop_gradient(found.order_TE), settings.k)[1]


def limit_to_groups(
    choice_TE: jax.Array, config: RouterConfig, rank_of_sum: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Leaves each token the experts of its M best groups; the others become -inf.

    V2 (device-limited) scores a group by its best expert, V3 (node-limited) by the sum of its two
    best.

    Args:
      choice_TE: scores, with a bias or without, or numbers in their order.
      config: of the router.
      rank_of_sum: of these numbers, as `Scoring.rank_of_sum`.
    """
    t, e = choice_TE.shape
    by_group = choice_TE.reshape(t, config.n_group, e // config.n_group)
    if config.group_score == "max":
        score_TG = by_group.max(axis=-1)
    else:
        score_TG = rank_of_sum(jax.lax.top_k(by_group, 2)[0])
    _, group_TM = jax.lax.top_k(score_TG, config.topk_group)
    kept_TG = (group_TM[:, :, None] == jnp.arange(config.n_group)).any(axis=1)
    # -inf and not 0: a biased score may be negative, and 0 would beat it.
    return jnp.where(kept_TG[:, :, None], by_group, -jnp.inf).reshape(t, e)


def leave_out(choice_TE: jax.Array, left_out_E: jax.Array | None) -> jax.Array:
    """Masks experts for all tokens with -inf.

    Args:
      choice_TE: numbers by which experts are chosen; identity experts come last, and stay.
      left_out_E: bool, of the routed experts; None: all stay.
    """
    if left_out_E is None:
        return choice_TE
    n_identity = choice_TE.shape[1] - len(left_out_E)
    return jnp.where(jnp.pad(left_out_E, (0, n_identity)), -jnp.inf, choice_TE)


def mask_best(choice_TE: jax.Array, n: int) -> jax.Array:
    """Masks each token's n best experts with -inf (V1 figure 4)."""
    _, best_Tn = rows.top_k(choice_TE, n)
    masked_TE = (best_Tn[:, :, None] == jnp.arange(choice_TE.shape[1])).any(axis=1)
    return jnp.where(masked_TE, -jnp.inf, choice_TE)


def _from_scores(
    found: Scores, logits: jax.Array, inputs: RouterInputs, settings: RouterSettings
) -> Routing:
    """Chooses by score, bias and groups; the gates are of the plain scores."""
    config = settings.config
    biased = "bias_E" in inputs.state
    limited = config.topk_group < config.n_group
    choice_TE = found.order_TE
    if biased:
        choice_TE = found.s_TE + jax.lax.stop_gradient(inputs.state["bias_E"])
    # Before the groups, which are as good as the experts that are left in them.
    choice_TE = leave_out(choice_TE, inputs.left_out_E)
    if limited:
        plain = found.logits_TE is None or biased
        rank_of_sum = total if plain else SCORING[config.scoring_func].rank_of_sum
        choice_TE = limit_to_groups(choice_TE, config, rank_of_sum)
    if settings.mask_best:
        choice_TE = mask_best(choice_TE, settings.mask_best)
    value_TK, ids_TK = settings.top_k(choice_TE, settings.k)
    if biased or limited or config.norm_topk_prob or found.logits_TE is not None:
        gates_TK = gates(found, ids_TK, config)
    else:
        gates_TK = value_TK * config.routed_scaling_factor  # they are the scores: none is gathered
    best_TK = best(found, settings) if biased or limited else None
    return Routing(ids_TK, gates_TK, found.affinity_TE, logits, best_TK=best_TK)
