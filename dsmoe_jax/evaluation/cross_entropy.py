"""Cross-entropy of the next token as sums over predicted tokens: in training and on held-out text.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.data.pipeline import Batch


class Sums(NamedTuple):
    """Sums over predicted tokens: their negative log-likelihood, number, and bytes."""

    nll: jax.Array
    tokens: jax.Array
    bytes: jax.Array


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
