"""A router as a policy that is rewarded for its choices: REINFORCE (2202.01169 section 3).

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token,
L MoE layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.moe.routers import scored
from dsmoe_jax.moe.routers.settings import RouterSettings
from dsmoe_jax.moe.types import RouterInputs, Routing


def reinforce(logits_TE: jax.Array, inputs: RouterInputs, settings: RouterSettings) -> Routing:
    """Experts drawn from the policy softmax(logits) in training, its K best in evaluation.

    K experts are drawn one after the other, without replacement (by adding Gumbel noise to the
    logits).  Every gate is 1/K, so that the router learns by `policy_loss` alone.
    """
    choice_TE = scored.leave_out(jax.lax.stop_gradient(logits_TE), inputs.left_out_E)
    if inputs.rng is not None:
        choice_TE += inputs.draw(jax.random.gumbel, settings.n_experts)
    _, ids_TK = settings.top_k(choice_TE, settings.k)
    gate = settings.config.routed_scaling_factor / settings.k
    gates_TK = jnp.full(ids_TK.shape, gate, jnp.float32)
    found = scored.scores(logits_TE, settings.config)
    best_TK = scored.best(found, settings)
    return Routing(ids_TK, gates_TK, found.affinity_TE, logits_TE, best_TK=best_TK)


class PolicySample(NamedTuple):
    """Experts drawn from a policy: their log-probability, and the policy's entropy in nats.

    Both are float32 of shape (T,), (B, S) or (L, B, S).
    """

    log_prob: jax.Array
    entropy: jax.Array


def sample_of(routing: Routing) -> PolicySample:
    """Log-probability and entropy of a routing drawn by `reinforce`, for the policy loss."""
    assert routing.logits_TE is not None, "a policy has logits"
    log_prob_T = log_probability(routing.logits_TE, routing.ids_TK)
    return PolicySample(log_prob_T, softmax_entropy(routing.logits_TE))


def log_probability(logits_TE: jax.Array, ids_TK: jax.Array) -> jax.Array:
    """Log of the probability that the policy draws these experts in this order; (T,)."""
    left_TE = logits_TE
    total_T = jnp.zeros(len(logits_TE))
    for k in range(ids_TK.shape[1]):
        drawn_TE = ids_TK[:, k : k + 1] == jnp.arange(logits_TE.shape[1])
        drawn_T = jnp.where(drawn_TE, logits_TE, 0.0).sum(axis=1)
        total_T += drawn_T - jax.nn.logsumexp(left_TE, axis=1)
        left_TE = jnp.where(drawn_TE, -jnp.inf, left_TE)
    return total_T


def softmax_entropy(logits_TE: jax.Array) -> jax.Array:
    """Entropy of softmax(logits) in nats; (T,)."""
    return -(jax.nn.softmax(logits_TE) * jax.nn.log_softmax(logits_TE)).sum(axis=1)


def policy_loss(
    sample_LBS: PolicySample, nll_BS: jax.Array, mask_BS: jax.Array, entropy_factor: float
) -> jax.Array:
    """Score-function estimate of how the expected loss depends on the policy (2202.01169).

        gradient = - sum_lt A_t grad log pi_l(choice of t),    A_t = r_t - baseline_t

    The reward r_t of a token's choices, in all layers, is minus its own negative log-likelihood;
    the baseline is the mean reward of the other tokens of its sequence.  The estimate is exact in
    expectation for what a choice does to its own token.  What it does to later tokens, through
    attention in the layers above, is left out: their losses would add more noise than signal.

    An entropy bonus keeps the policy from becoming deterministic too early.

    Args:
      sample_LBS: log-probabilities of the experts drawn and entropies, in L layers.
      nll_BS: nats, 0 where masked.
      mask_BS: float32, 1 where there is a target.
      entropy_factor: weight of a nat of entropy against a nat of a token's loss.

    Returns:
      A sum over the tokens, to be differentiated: its value is that of the entropy bonus alone.
    """
    others_B1 = jnp.maximum(mask_BS.sum(axis=1, keepdims=True) - 1, 1)
    baseline_BS = (nll_BS - nll_BS.sum(axis=1, keepdims=True)) / others_B1
    advantage_BS = jax.lax.stop_gradient(-nll_BS - baseline_BS) * mask_BS
    loss = -(advantage_BS * sample_LBS.log_prob).sum()
    bonus = entropy_factor * (sample_LBS.entropy * mask_BS).sum()
    return loss - jax.lax.stop_gradient(loss) - bonus  # the value of `loss` has no meaning
