"""What an MoE layer reports of a batch, to be logged.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token,
D devices of the config (`expert_groups`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe import dispatch, dropping, losses
from dsmoe_jax.moe.types import Choice, Drawn, Routing


class RouterStats(NamedTuple):
    """What one MoE layer reports of tokens: float32 sums over the valid ones (no padding).

    Those of the parts of a batch add up to those of the batch.

    Attributes:
      tokens: valid ones.
      load_E: assignments that each routed expert received.
      sums: over the tokens, of what is logged as a mean: `top_gate` (of the best expert),
        `gate_sum` (of all K), `entropy` of the affinities in nats (ln E is undecided) and `z`, the
        square of the logits' log-sum-exp (as `losses.router_z`); without what the router lacks.
      terms: what the tokens contribute to the balance terms, by name: those with a weight.
      ledger: what was sent, computed and dropped.
      device_rows_D: tokens that go to each of the `expert_groups` devices, each token once however
        many of its experts are there; after dropping.
      exchange: what the dispatch did.
      drawn_BS: of the choices, from a router that draws them; no step reports it.
      choice: ids_BSK and gates_BSK that the experts got; a step reports them if it records.
    """

    tokens: jax.Array
    load_E: jax.Array
    sums: dict[str, jax.Array]
    terms: dict[str, losses.Part]
    ledger: dropping.Ledger
    device_rows_D: jax.Array
    exchange: dispatch.Exchange
    drawn_BS: Drawn | None = None
    choice: Choice | None = None


def router_stats(
    routing: Routing,
    kept_TK: jax.Array,
    valid_BS: jax.Array,
    ledger: dropping.Ledger,
    exchange: dispatch.Exchange,
    config: MoEConfig,
) -> RouterStats:
    """What is reported of a routing, of which only the assignments `kept_TK` were computed."""
    valid_T = valid_BS.reshape(-1).astype(jnp.float32)
    # Without gradients, else the backward pass would go through what is only logged.
    columns = of_tokens(jax.lax.stop_gradient(routing), config)
    # Products add up, because on a CPU every sum by itself is a chain of small kernels.
    columns_CT = jnp.stack([jnp.ones_like(valid_T), *columns.values()])
    tokens, *sums = jnp.matmul(columns_CT, valid_T, precision="highest")
    return RouterStats(
        tokens=tokens,
        load_E=ledger.sent_E,
        sums=dict(zip(columns, sums, strict=True)),
        terms={n: losses.part(n, routing, valid_BS, config) for n in losses.active_terms(config)},
        ledger=ledger,
        device_rows_D=jnp.matmul(valid_T, reached(kept_TK, config), precision="highest"),
        exchange=exchange,
    )


def reached(ids_TK: jax.Array, config: MoEConfig) -> jax.Array:
    """1 where a token goes to one of the `expert_groups` devices, float32 (T, D)."""
    d = config.expert_groups
    device_TK = ids_TK // (config.n_routed_experts // d)
    return (device_TK[:, :, None] == jnp.arange(d)).any(axis=1).astype(jnp.float32)


def of_tokens(routing: Routing, config: MoEConfig) -> dict[str, jax.Array]:
    """What is logged as a mean over tokens, by name, each (T,): see `RouterStats.sums`.

    A softmax of logits needs no logarithm for every expert.  Where the mean logit is known, only
    differences of logits are looked at, written as `jax.nn.softmax` has them: XLA on CPU makes them
    together with the router's product and never writes down the logits, unless somebody asks.
    """
    gates_TK, s_TE, z_TE = routing.gates_TK, routing.affinity_TE, routing.logits_TE
    columns = {"top_gate": gates_TK[:, 0], "gate_sum": gates_TK.sum(axis=1)}
    if s_TE is not None:
        columns["entropy"] = jax.scipy.special.entr(s_TE).sum(axis=1)
    if z_TE is not None:
        below_TE = z_TE - z_TE.max(axis=1, keepdims=True)
        log_sum_T = jnp.log(jnp.exp(below_TE).sum(axis=1))
        mean_T = z_TE.mean(axis=1) if routing.mean_logit_T is None else routing.mean_logit_T
        columns["z"] = jnp.square(mean_T - below_TE.mean(axis=1) + log_sum_T)
        if s_TE is not None and s_TE.shape == z_TE.shape and config.scoring_func == "softmax":
            columns["entropy"] = log_sum_T - (s_TE * below_TE).sum(axis=1)
    return columns
