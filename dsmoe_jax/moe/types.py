"""Values that the seams of the layer hand to each other.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated ones per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """The experts of each token, and the weights of their outputs.

    Attributes:
      ids_TK: int32, the chosen experts of each token, all different, best first.  Id E is
        unassigned: no expert computes it, and its gate is 0.
      gates_TK: float32, the weight of each chosen expert's output (V1 eq. 10).
      affinity_TE: float32, the affinity of each token for each expert; the balance losses take
        their gradient from it.  Rows sum to 1: softmax (V1 eq. 11), or sigmoid scores divided by
        their sum (V3 eq. 19).  None for a router without affinities.
      logits_TE: float32, the logits of the affinities, for the z-loss; None for a router without
        logits.
      chosen_TK: int32, the choice before the router itself left experts out at random: the balance
        terms count it, and gates are normalised by the scores in it.  None: `ids_TK`.
      best_TK: int32, the K experts of the largest plain scores, whichever are chosen, which V3's
        sequence-wise term counts; None: the chosen ones.
    """

    ids_TK: jax.Array
    gates_TK: jax.Array
    affinity_TE: jax.Array | None
    logits_TE: jax.Array | None = None
    chosen_TK: jax.Array | None = None
    best_TK: jax.Array | None = None

    @property
    def counted_TK(self) -> jax.Array:
        """The experts that the balance terms count."""
        return self.ids_TK if self.chosen_TK is None else self.chosen_TK


class RecordedRouting(NamedTuple):
    """A routing as it is recorded and replayed; all are (T, K), (B, S, K) or more.

    Attributes:
      ids: int32, the experts that computed; E is unassigned, in all three.
      gates: float32, of those.
      sent: int32, the experts before dropping: those that balance terms count.
      chosen: int32, those and what the router left out: those that gates are normalised over.
    """

    ids: jax.Array
    gates: jax.Array
    sent: jax.Array
    chosen: jax.Array


class MoEInputs(NamedTuple):
    """Inputs of a layer besides the activations.

    Attributes:
      token_ids_BS: int32.
      valid_BS: bool, False for padding.
      rng: random key in training; None is evaluation.
      sequence_ids_B: int32, the place of each sequence in the global batch; None: 0, 1, 2, ...
      replayed: recorded routing, (B, S, K), for a router that replays; in evaluation its ids and
        gates replace those of any router.
      segment_ids_BS: int32, the document of each token, 0 for padding; the tokens of a document
        stand together.  None: one document a sequence.
      left_out_E: bool, routed experts that no token may choose, see `interventions.check_left_out`;
        only in evaluation.  None: none.
      task_ids_BS: int32, the task of each token's document, for routers by task.  None: not known.
    """

    token_ids_BS: jax.Array
    valid_BS: jax.Array
    rng: jax.Array | None = None
    sequence_ids_B: jax.Array | None = None
    replayed: RecordedRouting | None = None
    segment_ids_BS: jax.Array | None = None
    left_out_E: jax.Array | None = None
    task_ids_BS: jax.Array | None = None


class RouterInputs(NamedTuple):
    """Inputs of a router besides the logits.

    Attributes:
      token_ids_T: int32, for routers that look at the token itself (hash).
      valid_T: bool, False for padding, for routers that compare tokens; None: all are valid.
      rng: random key in training; None is evaluation: no noise, no forced balance.
      state: the layer's variables of this router by name, see `routers.RouterState`.
      replayed: routing recorded in another run, (T, K), for routers that replay; None: none.
      sequence_ids_B: int32, the place of each sequence in the global batch; None: the T tokens are
        one sequence, the first.
      left_out_E: bool, routed experts that no token may choose; None: none.
      task_ids_T: int32, the task of each token's document, for routers by task; None: not known.
    """

    token_ids_T: jax.Array
    valid_T: jax.Array | None = None
    rng: jax.Array | None = None
    state: Mapping[str, jax.Array] = {}
    replayed: RecordedRouting | None = None
    sequence_ids_B: jax.Array | None = None
    left_out_E: jax.Array | None = None
    task_ids_T: jax.Array | None = None

    def draw(self, sample: Callable[..., jax.Array], *shape: int) -> jax.Array:
        """Random numbers of shape (T, *shape), drawn with a key for each sequence.

        They do not depend on how the global batch is cut into micro-batches or over devices.

        Args:
          sample: `(key, shape) -> numbers`, such as `jax.random.normal`.
          *shape: shape of one token's numbers.
        """
        assert self.rng is not None, "evaluation draws nothing"
        sequence_ids_B = self.sequences()
        t = len(self.token_ids_T)
        per_sequence = t // len(sequence_ids_B)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.rng, sequence_ids_B)
        numbers = jax.vmap(lambda key: sample(key, (per_sequence, *shape)))(keys_B)
        return numbers.reshape(t, *shape)

    def sequences(self) -> jax.Array:
        """`sequence_ids_B`; that of one sequence, the first, where it is None."""
        if self.sequence_ids_B is None:
            return jnp.zeros(1, jnp.int32)
        return self.sequence_ids_B


def unassign(routing: Routing, keep: jax.Array, n_experts: int) -> Routing:
    """Takes assignments out of a routing: they get id E and gate 0.

    Args:
      routing: of T tokens.
      keep: bool, (T, K) or (T, 1), the assignments that stay.
      n_experts: E.
    """
    return routing._replace(
        ids_TK=jnp.where(keep, routing.ids_TK, n_experts),
        gates_TK=jnp.where(keep, routing.gates_TK, 0.0),
    )


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
