"""Cross-entropy of the next token as sums over predicted tokens: in training and on held-out text.

Shapes: B sequences, S positions, V vocabulary, K modules of multi-token prediction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.model import mtp
from dsmoe_jax.model.mtp import Ahead


class Sums(NamedTuple):
    """Sums over predicted tokens: their negative log-likelihood, number, and bytes."""

    nll: jax.Array
    tokens: jax.Array
    bytes: jax.Array


class AheadSums(NamedTuple):
    """Sums over the tokens that each module of multi-token prediction predicts, (K,).

    Attributes:
      nll: negative log-likelihood.
      tokens: their number.
      agreed: those of which the model finds the same token best: drafts that would be accepted.
    """

    nll: jax.Array
    tokens: jax.Array
    agreed: jax.Array


def ahead_sums(ahead: Ahead, batch: Batch) -> AheadSums:
    """The sums of a batch.

    Args:
      ahead: predictions of the modules.
      batch: has the targets' documents, and says which of them count.
    """
    depth = len(ahead.nll_KBS)
    mask_BS = jnp.asarray(batch["loss_mask_BS"]).astype(jnp.float32)
    known_KBS = mtp.segment_ids(jnp.asarray(batch["segment_ids_BS"]), depth) > 0
    mask_KBS = jnp.where(known_KBS, mtp.all_ahead(mask_BS, depth), 0.0)

    def total(x_KBS: jax.Array) -> jax.Array:
        return (x_KBS * mask_KBS).sum(axis=(1, 2))

    return AheadSums(total(ahead.nll_KBS), total(jnp.ones(())), total(ahead.agrees_KBS))


def token_sums(nll_BS: jax.Array, batch: Batch, bytes_V: Any) -> tuple[jax.Array, Sums]:
    """The negative log-likelihoods with 0 where they are masked, and the sums of a batch.

    Args:
      nll_BS: of every target, float32.
      batch: has the targets.
      bytes_V: UTF-8 bytes of each token.
    """
    mask_BS = batch["loss_mask_BS"].astype(jnp.float32)
    nll_BS = nll_BS * mask_BS
    bytes_V = jnp.asarray(bytes_V)  # in here: a traced function may not close over global arrays
    n_bytes = (bytes_V[batch["targets_BS"]].astype(jnp.float32) * mask_BS).sum()
    return nll_BS, Sums(nll_BS.sum(), mask_BS.sum(), n_bytes)
