"""The MoE feed-forward layer: shared experts plus routed experts (V1 eqs. 9-11).

    h_t = sum_{i <= Ks} FFN_i(u_t) + sum_{i in TopK} g_it FFN_i(u_t)

(The residual of eq. 9 is added by the transformer block.)

Shapes: B sequences, S their length, T = B*S tokens, D hidden, F expert width, E routed experts,
K activated per token.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ModelConfig, MoEConfig
from dsmoe_jax.moe import dispatch, dropping, experts, losses, routers
from dsmoe_jax.moe.legacy import flat
from dsmoe_jax.moe.report import RouterStats, router_stats
from dsmoe_jax.moe.types import Choice, Drawn, RouterInputs, Routing
from dsmoe_jax.nn.layers import SwiGLU, init_matrix


class RouterBias(nnx.Variable):
    """The loss-free balance bias of each routed expert: state, but not a parameter.

    The training step moves it once per optimizer step; no gradient and no weight decay does.
    """


class HashTable(nnx.Variable):
    """The expert of each token id, made of token counts before the first step: never changed."""


class MoELayer(nnx.Module):
    """Shared experts beside a router, a dispatcher and routed experts.

    Raises:
      ValueError: at construction, for an unknown router, dispatcher or expert backend, a router
        that cannot serve the config, or a balance term without affinities to balance.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe = flat(config.moe)
        d, e, f = config.hidden_size, moe.n_routed_experts, moe.moe_intermediate_size
        self.config = moe
        if moe.n_shared_experts:
            # Shared experts all see every token: side by side they are one wide FFN.
            self.shared = SwiGLU(d, moe.n_shared_experts * f, config.initializer_range, rngs=rngs)
        if not e:
            return
        router = routers.get_router(moe)
        dropping.check_policies(moe, scored=router.learned)
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
          replayed: ids_BSK and gates_BSK, for a router that replays; in evaluation whatever the
            router they take the place of its own.

        Returns:
          y_BSD, and the router's statistics (None without routed experts).
        """
        moe = self.config if rng is not None else dropping.in_evaluation(self.config)
        y_BSD, stats = None, None
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
                if replayed is not None and rng is None:
                    routing = routing._replace(ids_TK=replayed.ids, gates_TK=replayed.gates)
            kept = nobody_computes_padding(routing, valid_BS, moe.n_routed_experts)
            ledger, limit = dropping.ledger(kept.ids_TK, kept.ids_TK, len(x_BSD), moe), None
            if moe.capacity_factor:
                kept, ledger, limit = drop(kept, sequence_B, moe)
            y_TD, exchange = self.routed(x_TD, kept, limit)
            y_BSD = y_TD.reshape(x_BSD.shape)
            ledger = ledger._replace(computed_E=exchange.computed_E)
            stats = router_stats(routing, kept.ids_TK, valid_BS, ledger, exchange, moe)
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
        # At highest precision: an accelerator's default would round to bfloat16.
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        logits = product("td,ed->te", x_TD, self.router_ED[...])
        routing = router.route(logits, inputs, moe)
        if routing.logits_TE is logits:  # not others, such as with noise
            mean_D = self.router_ED[...].mean(axis=0)
            routing = routing._replace(mean_logit_T=product("td,d->t", x_TD, mean_D))
        return routing

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


def drop(
    routing: Routing, sequence_B: jax.Array, config: MoEConfig
) -> tuple[Routing, dropping.Ledger, int | None]:
    """What the capacity factor leaves of a routing, the ledger, and the limit that it guarantees.

    Buffers of fixed size need a limit for each shard of the mesh: there each drops for itself.
    """
    factor, b, t = config.capacity_factor, len(sequence_B), len(routing.ids_TK)
    if config.dispatch != "capacity":
        return *dropping.drop(routing, sequence_B, factor, config), None
    shards, devices = dispatch.token_shards(), dispatch.expert_devices()
    kept, ledger = dropping.drop(routing, sequence_B, factor, config, shards)
    return kept, ledger, dropping.most_kept((b // shards, t // b), factor, config, devices)


def nobody_computes_padding(routing: Routing, valid_BS: jax.Array, n_experts: int) -> Routing:
    """Sends padding to nobody (expert E): nobody looks at what the routed experts made of it."""
    valid_T1 = valid_BS.reshape(-1, 1)
    return routing._replace(
        ids_TK=jnp.where(valid_T1, routing.ids_TK, n_experts),
        gates_TK=jnp.where(valid_T1, routing.gates_TK, 0.0),
    )
