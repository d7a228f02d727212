"""What the seams hand to each other.

Shapes: T tokens, E routed experts, K activated ones per token, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight.

    Attributes:
      ids_TK: int32, the chosen experts of each token, all different, best first.
      gates_TK: float32, the weight of each chosen expert's output (V1 eq. 10).
      affinity_TE: float32, the token-to-expert affinities s after softmax or sigmoid (V1 eq. 11),
        from which the balance losses take their gradient; None for a router that has none.
    """

    ids_TK: jax.Array
    gates_TK: jax.Array
    affinity_TE: jax.Array | None


class RouterInputs(NamedTuple):
    """What a router may look at besides the logits.

    Attributes:
      token_ids_T: int32, for routers that look at the token itself (hash).
    """

    token_ids_T: jax.Array


def count_load(ids_TK: jax.Array, n_experts: int, valid_T: jax.Array | None = None) -> jax.Array:
    """Assignments that each expert receives, float32 of shape (E,).

    Args:
      ids_TK: int32 expert of each assignment.
      n_experts: E.
      valid_T: tokens to count (False for padding); None counts all.
    """
    # Comparing and adding fuses into one pass; a bincount would be a slow scatter-add.
    chosen_TE = (ids_TK[:, :, None] == jnp.arange(n_experts)).sum(axis=1, dtype=jnp.float32)
    if valid_T is not None:
        chosen_TE = jnp.where(valid_T[:, None], chosen_TE, 0.0)
    return chosen_TE.sum(axis=0)
