"""The training loss: a sum of parts, each a line of `LOSS_PARTS`.

    loss = cross-entropy + sum of the weighted balance terms + loss of a router that is a policy
           + weighted loss of multi-token prediction + weighted differences from a teacher

A new part is a function of a `LossContext` and a line there.

The global batch may be computed in micro-batches, and each computes its share of every part.  The
shares add up to the part, and so do their gradients: a part divides by counts of the whole batch,
never by those of the micro-batch.

Shapes: B sequences of a micro-batch, S positions, L MoE layers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import Config
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.evaluation.cross_entropy import AheadSums, Sums
from dsmoe_jax.model.types import Scored
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.moe.routers.policy import policy_loss
from dsmoe_jax.training.distillation import Distilled


class LossContext(NamedTuple):
    """Values that a part of the loss may look at.

    Attributes:
      config: of the run.
      batch: the micro-batch.
      output: of the model on it.
      nll_BS: negative log-likelihood of every target in nats, 0 where masked.
      sums: over those targets.
      terms: share of the micro-batch in each balance term, without its weight, (L,).
      weights: of the balance terms in this step.
      all_tokens: predicted tokens of the global batch.
      ahead: sums of multi-token prediction; None without it.
      mtp_weight: its weight in this step; None without it.
      distilled: sums of the differences from a teacher; None without one.
    """

    config: Config
    batch: Batch
    output: Scored
    nll_BS: jax.Array
    sums: Sums
    terms: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    all_tokens: jax.Array
    ahead: AheadSums | None = None
    mtp_weight: jax.Array | None = None
    distilled: Distilled | None = None


class LossPart(NamedTuple):
    """A registry line.

    Attributes:
      active: whether a run of a config has the part.
      value: share of a micro-batch in the part, a float32 scalar with all weights applied.
      logged_as: its key in metrics.jsonl; None for a part that other keys tell of.
      logits: whether it looks at `output.logits_BSV`, which are whole then, whatever they take.
    """

    active: Callable[[Config], bool]
    value: Callable[[LossContext], jax.Array]
    logged_as: str | None = None
    logits: bool = False


def cross_entropy(context: LossContext) -> jax.Array:
    """Nats per predicted token of the global batch; with a teacher the share that it leaves."""
    value = context.sums.nll / context.all_tokens
    section = context.config.train.distillation
    return value if section is None else (1 - section.factor) * value


def balance(context: LossContext) -> jax.Array:
    """Balance terms, summed over the layers, times their weights."""
    return jnp.asarray(
        sum(weight * context.terms[name].sum() for name, weight in context.weights.items())
    )


def policy(context: LossContext) -> jax.Array:
    """REINFORCE for a router that draws its experts; the value is the entropy bonus alone."""
    report = context.output.report
    assert report is not None
    sample_LBS = report.loss_inputs.policy
    assert sample_LBS is not None, "a router that samples reports its sample"
    factor = get_router(context.config.model.moe)[1].option("entropy_factor")
    mask_BS = jnp.asarray(context.batch["loss_mask_BS"])
    return policy_loss(sample_LBS, context.nll_BS, mask_BS, factor) / context.all_tokens


def multi_token(context: LossContext) -> jax.Array:
    """Mean loss of the modules of multi-token prediction, times its weight (V3 eqs. 24-25).

    Eq. 24 divides by the number of tokens, not by the smaller one that a module predicts.
    """
    assert context.ahead is not None
    assert context.mtp_weight is not None
    return context.mtp_weight * context.ahead.nll.mean() / context.all_tokens


def distillation(context: LossContext) -> jax.Array:
    """Divergence from the teacher's predictions, times its weight (1503.02531, section 2)."""
    section = context.config.train.distillation
    assert section is not None
    assert context.distilled is not None
    return section.factor * context.distilled.divergence / context.all_tokens


def hidden_states(context: LossContext) -> jax.Array:
    """Mean squared difference from what the teacher's head gets, times its weight."""
    section = context.config.train.distillation
    assert section is not None
    assert section.hidden_factor is not None
    assert context.distilled is not None
    assert context.distilled.squared is not None
    return section.hidden_factor * context.distilled.squared / context.all_tokens


def _balances(config: Config) -> bool:
    moe = config.model.moe
    return moe.n_routed_experts > 0 and bool(moe.balance)


def _looks_ahead(config: Config) -> bool:
    return config.model.mtp is not None


def _samples(config: Config) -> bool:
    moe = config.model.moe
    return moe.n_routed_experts > 0 and get_router(moe)[0].samples


def _is_taught(config: Config) -> bool:
    return config.train.distillation is not None


def _compares_hidden(config: Config) -> bool:
    section = config.train.distillation
    return section is not None and section.hidden_factor is not None


# In the order in which they are added.
LOSS_PARTS: dict[str, LossPart] = {
    "cross_entropy": LossPart(lambda config: True, cross_entropy),  # its key is `loss`
    "balance": LossPart(_balances, balance),  # every term has a key
    "policy": LossPart(_samples, policy),  # the entropy is `router_entropy`
    "mtp": LossPart(_looks_ahead, multi_token),  # of each module `mtp_loss`, without the weight
    "distillation": LossPart(_is_taught, distillation, "distillation"),
    "hidden_states": LossPart(_compares_hidden, hidden_states, "distillation_hidden"),
}


def needs_logits(config: Config) -> bool:
    """Whether a part of a run's loss looks at the logits."""
    return any(part.logits and part.active(config) for part in LOSS_PARTS.values())


def training_loss(context: LossContext) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Share of a micro-batch in the training loss, and in each active part by name."""
    values = {
        name: part.value(context)
        for name, part in LOSS_PARTS.items()
        if part.active(context.config)
    }
    return functools.reduce(operator.add, values.values()), values


def balance_terms(output: Scored, whole: losses.WholeBatch) -> dict[str, jax.Array]:
    """Share of a micro-batch in each balance term that has a weight, without it, (L,)."""
    if output.report is None:
        return {}
    sums = output.report.loss_inputs.terms
    return {name: losses.value(name, part, whole) for name, part in sums.items()}
