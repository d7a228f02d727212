"""The MoE feed-forward layer: shared experts plus routed experts (V1 eqs. 9-11).

    h_t = sum_{i <= Ks} FFN_i(u_t) + sum_{i in TopK} g_it FFN_i(u_t)

(The residual of eq. 9 is added by the transformer block.)

Shapes: B sequences, S their length, T = B*S tokens, D hidden, F expert width, E routed experts,
K activated per token.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ModelConfig, MoEConfig
from dsmoe_jax.moe import capacity, dispatch, experts, losses, routers
from dsmoe_jax.moe.types import Choice, Drawn, RouterInputs, Routing
from dsmoe_jax.nn.layers import SwiGLU, init_matrix


class RouterBias(nnx.Variable):
    """The loss-free balance bias of each routed expert: state, but not a parameter.

    The training step moves it once per optimizer step; no gradient and no weight decay does.
    """


class HashTable(nnx.Variable):
    """The expert of each token id, made of token counts before the first step: never changed."""


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
    ledger: capacity.Ledger
    device_rows_D: jax.Array
    exchange: dispatch.Exchange
    drawn_BS: Drawn | None = None
    choice: Choice | None = None


class MoELayer(nnx.Module):
    """Shared experts beside a router, a dispatcher and routed experts.

    Raises:
      ValueError: at construction, for an unknown router, dispatcher or expert backend, a router
        that cannot serve the config, or a balance term without affinities to balance.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe = config.moe
        d, e, f = config.hidden_size, moe.n_routed_experts, moe.moe_intermediate_size
        self.config = moe
        if moe.n_shared_experts:
            # Shared experts all see every token: side by side they are one wide FFN.
            self.shared = SwiGLU(d, moe.n_shared_experts * f, config.initializer_range, rngs=rngs)
        if not e:
            return
        router = routers.get_router(moe)
        policy = capacity.get_policy(moe)
        drops = moe.capacity_factor or moe.evaluation_capacity_factor
        if drops and policy.by_score and not router.learned:
            raise ValueError(
                f"model.moe.drop_policy={moe.drop_policy!r}: the {moe.router} router has no"
                " affinities to drop by; must be 'position'"
            )
        dispatch.check_name(moe.dispatch)
        experts.get_backend(moe.expert_backend)
        terms = losses.active_terms(moe)
        for name, weight in terms.items():
            if not router.learned or (router.balanced and name != "router_z"):
                raise ValueError(
                    f"model.moe.{name}_factor={weight}: the {moe.router} router has no affinities"
                    " to balance; must be 0"
                )
        matrix = lambda *shape: init_matrix(rngs, shape, config.initializer_range)  # noqa: E731
        if router.learned:
            self.router_ED = matrix(router.logits_per_expert * e, d)
        if moe.bias_update_speed:
            self.bias_E = RouterBias(jnp.zeros((e,), jnp.float32))
        if moe.hash_table == "frequency":  # until it is filled every token goes to nobody, E
            self.table_V = HashTable(jnp.full((config.vocab_size,), e, jnp.int32))
        self.gate_EFD = matrix(e, f, d)
        self.up_EFD = matrix(e, f, d)
        self.down_EDF = matrix(e, d, f)

    def __call__(
        self,
        x_BSD: jax.Array,
        token_ids_BS: jax.Array,
        valid_BS: jax.Array,
        rng: jax.Array | None = None,
        sequence_B: jax.Array | None = None,
        replayed: Choice | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """Applies the layer.

        Args:
          x_BSD: activations, in the compute dtype.
          token_ids_BS: int32.
          valid_BS: bool, False for padding.
          rng: random key in training; None is evaluation.
          sequence_B: int32, the place of each sequence in the global batch; None: 0, 1, 2, ...
          replayed: ids_BSK and gates_BSK for a router that replays.

        Returns:
          y_BSD, and the router's statistics (None without routed experts).
        """
        moe, y_BSD, stats = self.config, None, None
        if moe.n_routed_experts:
            x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
            if sequence_B is None:
                sequence_B = jnp.arange(len(x_BSD))
            with jax.named_scope("router"):
                if replayed is not None:
                    replayed = Choice(*(x.reshape(-1, x.shape[-1]) for x in replayed))
                inputs = RouterInputs(
                    token_ids_BS.reshape(-1),
                    valid_BS.reshape(-1),
                    rng,
                    replayed=replayed,
                    sequence_B=sequence_B,
                )
                routing = self.route(x_TD, inputs)
            factor = moe.evaluation_capacity_factor if rng is None else moe.capacity_factor
            kept = nobody_computes_padding(routing, valid_BS, moe.n_routed_experts)
            ledger, limit = capacity.ledger(kept.ids_TK, kept.ids_TK, len(x_BSD), moe), None
            if factor:
                kept, ledger, limit = self.drop(kept, sequence_B, factor)
            y_TD, exchange = self.routed(x_TD, kept, limit)
            y_BSD = y_TD.reshape(x_BSD.shape)
            ledger = ledger._replace(computed_E=exchange.computed_E)
            stats = self.stats(routing, kept.ids_TK, valid_BS, ledger, exchange)
            choice = (x.reshape(*valid_BS.shape, -1) for x in (kept.ids_TK, kept.gates_TK))
            stats = stats._replace(choice=Choice(*choice))
            if routing.drawn_T is not None:
                drawn_BS = Drawn(*(x_T.reshape(valid_BS.shape) for x_T in routing.drawn_T))
                stats = stats._replace(drawn_BS=drawn_BS)
        if moe.n_shared_experts:
            # They wait for nothing of the above: XLA may compute them while rows are on their way.
            with jax.named_scope("shared_experts"):
                shared_BSD = self.shared(x_BSD)
            y_BSD = shared_BSD if y_BSD is None else y_BSD + shared_BSD
        assert y_BSD is not None
        return y_BSD, stats

    def route(self, x_TD: jax.Array, inputs: RouterInputs) -> Routing:
        """The routing of activations, always in float32; the layer adds its bias to the inputs."""
        moe = self.config
        router = routers.get_router(moe)
        if moe.hash_table == "frequency":
            inputs = inputs._replace(table_V=self.table_V[...])
        if not router.learned:
            return router.route(None, inputs, moe)
        x_TD = x_TD.astype(jnp.float32)
        if moe.router_jitter and inputs.rng is not None:
            jitter_rng, rng = jax.random.split(inputs.rng)
            low, high = 1 - moe.router_jitter, 1 + moe.router_jitter
            sample = functools.partial(jax.random.uniform, minval=low, maxval=high)
            x_TD *= inputs._replace(rng=jitter_rng).draw(sample, x_TD.shape[1])
            inputs = inputs._replace(rng=rng)
        if moe.bias_update_speed:
            inputs = inputs._replace(bias_E=self.bias_E[...])
        logits = jnp.einsum(
            "td,ed->te",
            x_TD,
            self.router_ED[...],
            precision=jax.lax.Precision.HIGHEST,  # an accelerator's default would round to bf16
        )
        return router.route(logits, inputs, moe)

    def drop(
        self, routing: Routing, sequence_B: jax.Array, factor: float
    ) -> tuple[Routing, capacity.Ledger, int | None]:
        """What a capacity factor leaves of a routing, the ledger, and the limit that it guarantees.

        Buffers of fixed size need a limit for each shard of the mesh: there each drops for itself.
        """
        moe, b, t = self.config, len(sequence_B), len(routing.ids_TK)
        if moe.dispatch != "capacity":
            return *capacity.drop(routing, sequence_B, factor, moe), None
        shards, devices = dispatch.token_shards(), dispatch.expert_devices()
        kept, ledger = capacity.drop(routing, sequence_B, factor, moe, shards)
        return kept, ledger, capacity.most_kept((b // shards, t // b), factor, moe, devices)

    def routed(
        self, x_TD: jax.Array, routing: Routing, limit: int | None = None
    ) -> tuple[jax.Array, dispatch.Exchange]:
        """The routed experts' weighted sum y_TD for a given routing, and what the dispatch did.

        `limit` is the most assignments of one shard of tokens on one device; None: no limit.
        """
        moe = self.config
        weights = experts.ExpertWeights(self.gate_EFD[...], self.up_EFD[...], self.down_EDF[...])

        def run(rows_ND, group_sizes_E, weights):
            with jax.named_scope("experts"):
                return experts.run_experts(rows_ND, group_sizes_E, weights, moe.expert_backend)

        with jax.named_scope("dispatch"):
            return dispatch.dispatch(x_TD, routing, weights, run, moe, limit)

    def stats(
        self,
        routing: Routing,
        kept_TK: jax.Array,
        valid_BS: jax.Array,
        ledger: capacity.Ledger,
        exchange: dispatch.Exchange,
    ) -> RouterStats:
        """What is reported of a routing, of which only the assignments `kept_TK` were computed."""
        moe, valid_T = self.config, valid_BS.reshape(-1).astype(jnp.float32)
        # Without gradients, else the backward pass would go through what is only logged.
        columns = {"tokens": jnp.ones_like(valid_T)}
        columns |= logged_of_tokens(jax.lax.stop_gradient(routing), moe)
        # One product for all of them: on a CPU each sum by itself is a chain of small kernels.
        sums_N = jnp.matmul(jnp.stack(list(columns.values())), valid_T, precision="highest")
        sums = dict(zip(columns, sums_N, strict=True))
        return RouterStats(
            tokens=sums.pop("tokens"),
            load_E=ledger.sent_E,
            sums=sums,
            terms={n: losses.part(n, routing, valid_BS, moe) for n in losses.active_terms(moe)},
            ledger=ledger,
            device_rows_D=device_rows(kept_TK, moe),
            exchange=exchange,
        )


def nobody_computes_padding(routing: Routing, valid_BS: jax.Array, n_experts: int) -> Routing:
    """Sends padding to nobody (expert E): nobody looks at what the routed experts made of it."""
    valid_T1 = valid_BS.reshape(-1, 1)
    return routing._replace(
        ids_TK=jnp.where(valid_T1, routing.ids_TK, n_experts),
        gates_TK=jnp.where(valid_T1, routing.gates_TK, 0.0),
    )


def device_rows(ids_TK: jax.Array, config: MoEConfig) -> jax.Array:
    """Tokens that go to each of the `expert_groups` devices, each once, float32 (D,)."""
    d = config.expert_groups
    device_TK = ids_TK // (config.n_routed_experts // d)
    return (device_TK[:, :, None] == jnp.arange(d)).any(axis=1).sum(axis=0, dtype=jnp.float32)


def logged_of_tokens(routing: Routing, config: MoEConfig) -> dict[str, jax.Array]:
    """What is logged as a mean over tokens, by name, each (T,): see `RouterStats.sums`.

    A softmax of logits needs no logarithm for every expert.  Maximum and exponentials are written
    as `jax.nn.softmax` has them, not as `logsumexp` does, so that XLA takes the router's own.
    """
    gates_TK, s_TE, z_TE = routing.gates_TK, routing.affinity_TE, routing.logits_TE
    columns = {"top_gate": gates_TK[:, 0], "gate_sum": gates_TK.sum(axis=1)}
    if s_TE is not None:
        columns["entropy"] = jax.scipy.special.entr(s_TE).sum(axis=1)
    if z_TE is not None:
        max_T1 = z_TE.max(axis=1, keepdims=True)
        log_sum_T = jnp.log(jnp.exp(z_TE - max_T1).sum(axis=1))
        columns["z"] = jnp.square(max_T1[:, 0] + log_sum_T)
        if s_TE is not None and s_TE.shape == z_TE.shape and config.scoring_func == "softmax":
            columns["entropy"] = log_sum_T - (s_TE * (z_TE - max_T1)).sum(axis=1)
    return columns
