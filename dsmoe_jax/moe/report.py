"""Report of an MoE layer on a batch: inputs of the loss, sums for the log, recorded routing.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token,
D devices of the config (`expert_groups`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe import losses
from dsmoe_jax.moe.dispatch import DispatchReport
from dsmoe_jax.moe.dropping import Ledger
from dsmoe_jax.moe.routers import get_router, policy
from dsmoe_jax.moe.routers.policy import PolicySample
from dsmoe_jax.moe.routers.scores import SCORING
from dsmoe_jax.moe.types import RecordedRouting, Routing


class LossInputs(NamedTuple):
    """Inputs of the training loss from one layer; gradients flow through them.

    Attributes:
      terms: contribution of the tokens to each balance term of the config, by name.
      policy: (B, S), for a router that samples from a policy; None for the others.
    """

    terms: dict[str, losses.TermSums]
    policy: PolicySample | None


class LoggedSums(NamedTuple):
    """Sums to log of a layer, float32, over the valid tokens (no padding).

    The sums of all micro-batches add up to those of the batch.

    Attributes:
      tokens: number of valid tokens.
      load_E: assignments that each routed expert received, identity experts aside.
      token_sums: of what is logged as a mean over tokens: `top_gate` (the largest gate),
        `gate_sum` (of all K), `entropy` of the affinities in nats (ln E: uniform) and `z`, the
        squared log-sum-exp of the logits (as in `losses.router_z`).  A router without affinities
        or logits has no entry for them.
      ledger: assignments sent, computed and dropped.
      device_rows_D: tokens sent to each of the `expert_groups` devices, after dropping; a token
        with several experts on a device counts once.
      dispatch: report of the dispatch.
      identity_Z: choices of each identity expert; None for a layer without.
    """

    tokens: jax.Array
    load_E: jax.Array
    token_sums: dict[str, jax.Array]
    ledger: Ledger
    device_rows_D: jax.Array
    dispatch: DispatchReport
    identity_Z: jax.Array | None = None

    @property
    def load_of_choices(self) -> jax.Array:
        """Assignments of all that the router chooses among: `load_E`, then identity experts."""
        if self.identity_Z is None:
            return self.load_E
        return jnp.concatenate([self.load_E, self.identity_Z], axis=-1)


class LayerReport(NamedTuple):
    """Report of one MoE layer on a batch.

    Attributes:
      loss_inputs: for the training loss.
      logged: for the log.
      recorded: ids_BSK and gates_BSK after dropping, in the ids of the router (moe/identity).
      inputs_BSD: activations that the layer got; None unless `Intervention.keep_inputs` asks for
        them.
    """

    loss_inputs: LossInputs
    logged: LoggedSums
    recorded: RecordedRouting
    inputs_BSD: jax.Array | None = None


def loss_inputs(routing: Routing, segment_ids_BS: jax.Array, moe: MoEConfig) -> LossInputs:
    """Inputs of the training loss from a routing before dropping.

    Args:
      routing: of all tokens.
      segment_ids_BS: the document of each token, 0 for padding; see `losses.sums`.
      moe: config of the layer.
    """
    sample = None
    if get_router(moe)[0].samples:
        by_token = policy.sample_of(routing)
        sample = PolicySample(*(x_T.reshape(segment_ids_BS.shape) for x_T in by_token))
    return LossInputs(losses.layer_sums(routing, segment_ids_BS, moe), sample)


def logged_sums(
    routing: Routing,
    mean_logit_T: jax.Array | None,
    kept_TK: jax.Array,
    valid_BS: jax.Array,
    ledger: Ledger,
    dispatch: DispatchReport,
    moe: MoEConfig,
    identity_Z: jax.Array | None = None,
) -> LoggedSums:
    """Sums to log of a routing, of which only the assignments `kept_TK` were computed.

    Args:
      routing: before dropping.
      mean_logit_T: the mean of each token's logits, if it is known without them.
      kept_TK: routed experts after dropping.
      valid_BS: bool, False for padding.
      ledger, dispatch: of the batch.
      moe: config of the layer.
      identity_Z: choices of each identity expert, if there are any.
    """
    valid_T = valid_BS.reshape(-1).astype(jnp.float32)
    softmax = SCORING[moe.router.scoring_func].is_softmax
    # Without gradients: the backward pass would otherwise include what is only logged.
    columns = token_columns(*jax.lax.stop_gradient((routing, mean_logit_T)), softmax=softmax)
    # Sums as one matrix product: on CPU every sum by itself is a chain of small kernels.
    columns_CT = jnp.stack([jnp.ones_like(valid_T), *columns.values()])
    tokens, *sums = jnp.matmul(columns_CT, valid_T, precision="highest")
    return LoggedSums(
        tokens=tokens,
        load_E=ledger.sent_E,
        token_sums=dict(zip(columns, sums, strict=True)),
        ledger=ledger,
        device_rows_D=jnp.matmul(valid_T, reached(kept_TK, moe), precision="highest"),
        dispatch=dispatch,
        identity_Z=identity_Z,
    )


def recorded(
    routing: Routing, computed: Routing, valid_BS: jax.Array, unassigned: int
) -> RecordedRouting:
    """The routing of a batch, (B, S, K), in the ids of the router; padding is unassigned.

    Args:
      routing: before dropping.
      computed: after dropping, padding taken out.
      valid_BS: bool, False for padding.
      unassigned: the id of it.
    """

    def by_place(a_TK: jax.Array) -> jax.Array:
        return a_TK.reshape(*valid_BS.shape, -1)

    sent, chosen = (
        jnp.where(valid_BS[..., None], by_place(ids_TK), unassigned)
        for ids_TK in (routing.ids_TK, routing.counted_TK)
    )
    return RecordedRouting(by_place(computed.ids_TK), by_place(computed.gates_TK), sent, chosen)


def reached(ids_TK: jax.Array, moe: MoEConfig) -> jax.Array:
    """1 where a token goes to one of the `expert_groups` devices, float32 (T, D)."""
    d = moe.expert_groups
    device_TK = ids_TK // (moe.n_routed_experts // d)
    return (device_TK[:, :, None] == jnp.arange(d)).any(axis=1).astype(jnp.float32)


def token_columns(
    routing: Routing, mean_logit_T: jax.Array | None, *, softmax: bool
) -> dict[str, jax.Array]:
    """Quantities logged as a mean over tokens, by name, each (T,): see `LoggedSums.token_sums`."""
    gates_TK = routing.gates_TK
    s_TE = routing.affinity_TE
    z_TE = routing.logits_TE
    # The largest is not the first one where a bias decides who is first.
    columns = {"top_gate": gates_TK.max(axis=1), "gate_sum": gates_TK.sum(axis=1)}
    if s_TE is not None:
        columns["entropy"] = jax.scipy.special.entr(s_TE).sum(axis=1)
    if z_TE is not None:
        # With a known mean only differences of logits are used, written as in `jax.nn.softmax`: XLA
        # on CPU then fuses them with the router's product and never stores the logits, unless they
        # are needed elsewhere.
        below_TE = z_TE - z_TE.max(axis=1, keepdims=True)
        log_sum_T = jnp.log(jnp.exp(below_TE).sum(axis=1))
        mean_T = z_TE.mean(axis=1) if mean_logit_T is None else mean_logit_T
        columns["z"] = jnp.square(mean_T - below_TE.mean(axis=1) + log_sum_T)
        if s_TE is not None and s_TE.shape == z_TE.shape and softmax:
            # The entropy of a softmax needs no logarithm for every expert.
            columns["entropy"] = log_sum_T - (s_TE * below_TE).sum(axis=1)
    return columns
