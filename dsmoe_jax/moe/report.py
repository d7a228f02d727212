"""What an MoE layer reports of a batch: for the loss, for the log, for a recording.

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
from dsmoe_jax.moe.types import RecordedRouting, Routing


class LossInputs(NamedTuple):
    """What the training loss needs of a layer; gradients flow through it.

    Attributes:
      terms: what the tokens contribute to each balance term of the config, by name.
      policy: (B, S), of a router that samples a policy; None of the others.
    """

    terms: dict[str, losses.TermSums]
    policy: PolicySample | None


class LoggedSums(NamedTuple):
    """What is logged of a layer: float32 sums over the valid tokens (no padding).

    Those of the parts of a batch add up to those of the batch.

    Attributes:
      tokens: valid ones.
      load_E: assignments that each routed expert received.
      token_sums: over the tokens, of what is logged as a mean: `top_gate` (of the best expert),
        `gate_sum` (of all K), `entropy` of the affinities in nats (ln E is undecided) and `z`, the
        square of the logits' log-sum-exp (as `losses.router_z`); without what the router lacks.
      ledger: what was sent, computed and dropped.
      device_rows_D: tokens that go to each of the `expert_groups` devices, each token once however
        many of its experts are there; after dropping.
      dispatch: what the dispatch did.
    """

    tokens: jax.Array
    load_E: jax.Array
    token_sums: dict[str, jax.Array]
    ledger: Ledger
    device_rows_D: jax.Array
    dispatch: DispatchReport


class LayerReport(NamedTuple):
    """What one MoE layer reports of a batch.

    Attributes:
      loss_inputs: for the training loss.
      logged: for the log.
      recorded: ids_BSK and gates_BSK of the experts' real work, after dropping.
    """

    loss_inputs: LossInputs
    logged: LoggedSums
    recorded: RecordedRouting


def loss_inputs(routing: Routing, valid_BS: jax.Array, moe: MoEConfig) -> LossInputs:
    """What the training loss needs of a routing, before anything is dropped."""
    sample = None
    if get_router(moe)[0].samples:
        by_token = policy.sample_of(routing)
        sample = PolicySample(*(x_T.reshape(valid_BS.shape) for x_T in by_token))
    return LossInputs(losses.layer_sums(routing, valid_BS, moe), sample)


def logged_sums(
    routing: Routing,
    mean_logit_T: jax.Array | None,
    kept_TK: jax.Array,
    valid_BS: jax.Array,
    ledger: Ledger,
    dispatch: DispatchReport,
    moe: MoEConfig,
) -> LoggedSums:
    """What is logged of a routing, of which only the assignments `kept_TK` were computed.

    Args:
      routing: before dropping.
      mean_logit_T: the mean of each token's logits, where it is known without them.
      kept_TK: experts after dropping.
      valid_BS: bool, False for padding.
      ledger, dispatch: of the batch.
      moe: config of the layer.
    """
    valid_T = valid_BS.reshape(-1).astype(jnp.float32)
    softmax = moe.router.scoring_func == "softmax"
    # Without gradients, else the backward pass would go through what is only logged.
    columns = token_columns(*jax.lax.stop_gradient((routing, mean_logit_T)), softmax=softmax)
    # Products add up, because on a CPU every sum by itself is a chain of small kernels.
    columns_CT = jnp.stack([jnp.ones_like(valid_T), *columns.values()])
    tokens, *sums = jnp.matmul(columns_CT, valid_T, precision="highest")
    return LoggedSums(
        tokens=tokens,
        load_E=ledger.sent_E,
        token_sums=dict(zip(columns, sums, strict=True)),
        ledger=ledger,
        device_rows_D=jnp.matmul(valid_T, reached(kept_TK, moe), precision="highest"),
        dispatch=dispatch,
    )


def reached(ids_TK: jax.Array, moe: MoEConfig) -> jax.Array:
    """1 where a token goes to one of the `expert_groups` devices, float32 (T, D)."""
    d = moe.expert_groups
    device_TK = ids_TK // (moe.n_routed_experts // d)
    return (device_TK[:, :, None] == jnp.arange(d)).any(axis=1).astype(jnp.float32)


def token_columns(
    routing: Routing, mean_logit_T: jax.Array | None, *, softmax: bool
) -> dict[str, jax.Array]:
    """What is logged as a mean over tokens, by name, each (T,): see `LoggedSums.token_sums`.

    A softmax of logits needs no logarithm for every expert.  Where the mean logit is known, only
    differences of logits are looked at, written as `jax.nn.softmax` has them: XLA on CPU makes them
    together with the router's product and never writes down the logits, unless they are needed
    elsewhere.
    """
    gates_TK, s_TE, z_TE = routing.gates_TK, routing.affinity_TE, routing.logits_TE
    columns = {"top_gate": gates_TK[:, 0], "gate_sum": gates_TK.sum(axis=1)}
    if s_TE is not None:
        columns["entropy"] = jax.scipy.special.entr(s_TE).sum(axis=1)
    if z_TE is not None:
        below_TE = z_TE - z_TE.max(axis=1, keepdims=True)
        log_sum_T = jnp.log(jnp.exp(below_TE).sum(axis=1))
        mean_T = z_TE.mean(axis=1) if mean_logit_T is None else mean_logit_T
        columns["z"] = jnp.square(mean_T - below_TE.mean(axis=1) + log_sum_T)
        if s_TE is not None and s_TE.shape == z_TE.shape and softmax:
            columns["entropy"] = log_sum_T - (s_TE * below_TE).sum(axis=1)
    return columns
