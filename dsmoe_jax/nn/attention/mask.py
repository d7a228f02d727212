"""The mask of causal attention within documents, before anyone makes an array of it.

Shapes: B sequences, S query positions, L key positions (S, or the cache's length).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class CausalMask(NamedTuple):
    """Keys that each query may see: those of its own document, up to its own position.

    Padding is a document like any other (it sees itself), so that every query has a key.

    Attributes:
      segment_ids_BS: int32, the document of each query; None: one document a sequence.
      start: index of the first query among the keys; 0 without a cache.
      n_keys: L of a cache; None: the keys are those of the queries' own positions.
      key_segment_ids_BL: int32, the document of each key of a cache, if queries have documents.
    """

    segment_ids_BS: jax.Array | None = None
    start: jax.Array | int = 0
    n_keys: int | None = None
    key_segment_ids_BL: jax.Array | None = None

    def dense(self, batch: int, length: int) -> jax.Array:
        """The mask as an array, bool (B, S, L): as large as the scores of one head."""
        query_S = self.start + jnp.arange(length)
        key_L = query_S if self.n_keys is None else jnp.arange(self.n_keys)
        mask_BSL = jnp.broadcast_to(query_S[:, None] >= key_L, (batch, length, key_L.size))
        if self.segment_ids_BS is not None:
            key_ids_BL = self.segment_ids_BS if self.n_keys is None else self.key_segment_ids_BL
            assert key_ids_BL is not None, "documents of the queries, but not of the cache's keys"
            mask_BSL &= self.segment_ids_BS[:, :, None] == key_ids_BL[:, None, :]
        return mask_BSL
