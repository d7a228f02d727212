"""What the seams hand to each other.

Shapes: B sequences, T tokens, E routed experts, K activated ones per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Drawn(NamedTuple):
    """Of choices drawn from a policy: log-probability, and entropy of the policy; (T,) float32."""

    log_prob: jax.Array
    entropy: jax.Array


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight.

    Attributes:
      ids_TK: int32, the chosen experts of each token, all different, best first.  E stands for
        nobody: such an assignment is computed by no expert and has gate 0.
      gates_TK: float32, the weight of each chosen expert's output (V1 eq. 10).
      affinity_TE: float32, how much each token leans to each expert, from which the balance losses
        take their gradient.  Rows sum to 1: softmax (V1 eq. 11), or sigmoid scores divided by their
        sum (V3 eq. 19).  None for a router that has none.
      logits_TE: float32, what the affinities were made of (for the z-loss); None without.
      drawn_T: of the choice, if it was drawn from a policy; None if not.
      mean_logit_T: float32, the mean of a token's logits, if the layer has it without them.
    """

    ids_TK: jax.Array
    gates_TK: jax.Array
    affinity_TE: jax.Array | None
    logits_TE: jax.Array | None = None
    drawn_T: Drawn | None = None
    mean_logit_T: jax.Array | None = None


class Choice(NamedTuple):
    """What is recorded of a routing and replayed: `ids` and `gates`, (T, K) or (B, S, K)."""

    ids: jax.Array
    gates: jax.Array


class RouterInputs(NamedTuple):
    """What a router may look at besides the logits.

    Attributes:
      token_ids_T: int32, for routers that look at the token itself (hash).
      valid_T: bool, False for padding, for routers that compare tokens; None: all are valid.
      rng: random key in training; None is evaluation: no noise, nothing balanced by force.
      bias_E: float32, the loss-free balance bias, added to the scores that choose; None: no bias.
      table_V: int32, the expert of each token id, for a hash router with a table; None: no table.
      replayed: ids_TK and gates_TK recorded in another run, for routers that replay; None: none.
      sequence_B: int32, the place of each sequence in the global batch; None: the T tokens are one
        sequence, the first.
    """

    token_ids_T: jax.Array
    valid_T: jax.Array | None = None
    rng: jax.Array | None = None
    bias_E: jax.Array | None = None
    table_V: jax.Array | None = None
    replayed: Choice | None = None
    sequence_B: jax.Array | None = None

    def draw(self, sample: Callable[..., jax.Array], *shape: int) -> jax.Array:
        """Random numbers of shape (T, *shape), each sequence's from a key of its own.

        So they do not depend on how the global batch is cut into micro-batches or over devices.

        Args:
          sample: `(key, shape) -> numbers`, such as `jax.random.normal`.
          *shape: of one token's numbers.
        """
        assert self.rng is not None, "evaluation draws nothing"
        places_B, t = self.places(), len(self.token_ids_T)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.rng, places_B)
        numbers = jax.vmap(lambda key: sample(key, (t // len(places_B), *shape)))(keys_B)
        return numbers.reshape(t, *shape)

    def places(self) -> jax.Array:
        """`sequence_B`, whatever was given."""
        return jnp.zeros(1, jnp.int32) if self.sequence_B is None else self.sequence_B


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
