"""Identity experts: choices of the router that give a token back as it is (LongCat-Flash).

An identity expert computes nothing, is on no device and is sent nothing: `y += g x`.  It is a
choice like the others only for the router, whose ids are

    0 ... E-1          routed experts
    E ... E+Z-1        identity experts
    E+Z                unassigned

so that scores, gates, biases and balance terms know no difference; the device terms alone leave
identity experts out.  What comes after the router, dropping, dispatch and the ledger, sees routed
experts only, with id E for unassigned.  So loads, MaxVio and `sent = computed + dropped` are of
routed experts; the choices of identity experts are counted beside them, and are never dropped.

Shapes: T tokens, D hidden, E routed experts, Z identity experts, K activated per token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.types import Routing, count_load, unassign


class Identity(NamedTuple):
    """The choices of identity experts in a routing.

    Attributes:
      chosen_TK: bool, the assignments that are such.
      assigned: the whole routing, in the ids of the router.
    """

    chosen_TK: jax.Array
    assigned: Routing

    def add(self, y_TD: jax.Array, x_TD: jax.Array) -> jax.Array:
        """`y + g x`, with the sum of each token's gates of identity experts."""
        gate_T = jnp.where(self.chosen_TK, self.assigned.gates_TK, 0.0).sum(axis=1)
        weighted_TD = gate_T[:, None] * x_TD.astype(jnp.float32)
        return (y_TD.astype(jnp.float32) + weighted_TD).astype(y_TD.dtype)

    def join(self, kept: Routing, moe: MoEConfig) -> Routing:
        """The computed part of the whole routing, in the ids of the router.

        Args:
          kept: of routed experts, after dropping.
          moe: config of the layer.
        """
        lost = kept.ids_TK >= moe.n_routed_experts
        routed_TK = jnp.where(lost, moe.n_choices, kept.ids_TK)
        assigned = self.assigned
        return kept._replace(
            ids_TK=jnp.where(self.chosen_TK, assigned.ids_TK, routed_TK),
            gates_TK=jnp.where(self.chosen_TK, assigned.gates_TK, kept.gates_TK),
        )

    def count(self, moe: MoEConfig) -> jax.Array:
        """Choices of each identity expert, float32 (Z,)."""
        z = moe.n_identity_experts
        number_TK = self.assigned.ids_TK - moe.n_routed_experts
        return count_load(jnp.where(self.chosen_TK, number_TK, z), z)


def split(assigned: Routing, moe: MoEConfig) -> tuple[Routing, Identity | None]:
    """The routing of routed experts, and the choices of identity experts; None if there are none.

    Args:
      assigned: in the ids of the router.
      moe: config of the layer.
    """
    if not moe.n_identity_experts:
        return assigned, None
    e = moe.n_routed_experts
    ids_TK = assigned.ids_TK
    identity = Identity((ids_TK >= e) & (ids_TK < moe.n_choices), assigned)
    return unassign(assigned, ids_TK < e, e), identity
