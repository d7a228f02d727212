"""The MoE feed-forward layer: shared experts plus routed experts (V1 eqs. 9-11).

    h_t = sum_{i <= Ks} FFN_i(u_t) + sum_{i in TopK} g_it FFN_i(u_t)

(The residual of eq. 9 is added by the transformer block.)  `reference` has the same as one dense
loop; `routed` composes dispatch, experts and combine.

Shapes: B sequences, S their length, T = B*S tokens, D hidden, F expert width, E routed experts,
K activated per token, A tasks.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import DropConfig, MoEConfig
from dsmoe_jax.moe import dispatch, dropping, experts, interventions, kernels, losses, routers
from dsmoe_jax.moe.dropping import Sizes
from dsmoe_jax.moe.identity import split
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.kernels import RowKernels
from dsmoe_jax.moe.report import LayerReport, logged_sums, loss_inputs, recorded
from dsmoe_jax.moe.routed import expert_devices, routed_experts
from dsmoe_jax.moe.types import MoEInputs, RecordedRouting, RouterInputs, Routing, unassign
from dsmoe_jax.nn import quantisation
from dsmoe_jax.nn.feed_forward import FeedForward, form_of, init_bias
from dsmoe_jax.nn.layers import init_matrix
from dsmoe_jax.parallel.sharding import batch_shards

_MATRICES = ("gate_EFD", "up_EFD", "down_EDF")  # of the routed experts


class RouterVariable(nnx.Variable):
    """A variable of a router that is not a parameter; see `routers.RouterState`."""


class MoELayer(nnx.Module):
    """Shared experts beside a router, a dispatcher and routed experts.

    Raises:
      ValueError: at construction, for an unknown name, a router that cannot serve the config, or a
        balance term without affinities to balance.
    """

    def __init__(
        self,
        moe: MoEConfig,
        *,
        hidden_size: int,
        vocab_size: int,
        initializer_range: float,
        rngs: nnx.Rngs,
    ):
        d = hidden_size
        e = moe.n_routed_experts
        f = moe.moe_intermediate_size
        self.config = moe
        form = form_of(moe.expert)
        if moe.n_shared_experts:
            # Shared experts all see every token: side by side they are one wide FFN.
            self.shared = FeedForward(
                d, moe.shared_width, initializer_range, form, moe.quantised, rngs=rngs
            )
        if moe.shared_expert_gate:
            self.shared_gate_D = init_matrix(rngs, (d,), initializer_range)
        if not e:
            return
        check_layer(moe)
        router, settings = routers.get_router(moe)
        if router.learned:
            rows = router.logits_per_expert * moe.n_choices
            if router.by_task:
                columns = len(moe.router.tasks)
                self.router_EA = init_matrix(rngs, (rows, columns), initializer_range)
            else:
                self.router_ED = init_matrix(rngs, (rows, d), initializer_range)
            if moe.router.logits_bias:
                self.router_bias_E = init_bias(rows)
        if router.state is not None:
            first = router.state.first(dataclasses.replace(settings, vocab_size=vocab_size))
            for name, values in first.items():
                setattr(self, name, RouterVariable(values))
        self.gate_EFD = init_matrix(rngs, (e, f, d), initializer_range)
        self.up_EFD = init_matrix(rngs, (e, f, d), initializer_range)
        self.down_EDF = init_matrix(rngs, (e, d, f), initializer_range)
        if moe.quantised is not None:
            quantisation.hold(self, _MATRICES, moe.quantised.bits)
        if form.biases:
            self.gate_bias_EF = init_bias(e, f)
            self.up_bias_EF = init_bias(e, f)
            self.down_bias_ED = init_bias(e, d)

    def __call__(
        self, x_BSD: jax.Array, inputs: MoEInputs, intervention: Intervention = interventions.NONE
    ) -> tuple[jax.Array, LayerReport | None]:
        """Applies the layer.

        Args:
          x_BSD: activations, in the compute dtype.
          inputs: of the same tokens.
          intervention: a change to how the layer is used.

        Returns:
          y_BSD, and the report of the batch (None without routed experts).
        """
        chex.assert_equal_shape_prefix([x_BSD, inputs.token_ids_BS, inputs.valid_BS], 2)
        y_BSD = report = None
        if self.config.n_routed_experts:
            y_BSD, report = self._routed(x_BSD, inputs, intervention)
        if self.config.n_shared_experts and (intervention.shared_experts or y_BSD is None):
            # Independent of the routed experts: XLA may compute them during the exchange of rows.
            with jax.named_scope("shared_experts"):
                shared_BSD = self._shared(x_BSD)
            y_BSD = shared_BSD if y_BSD is None else y_BSD + shared_BSD
        assert y_BSD is not None
        return y_BSD, report

    def _shared(self, x_BSD: jax.Array) -> jax.Array:
        """The shared experts' part of the output, times its gate if the config has one."""
        y_BSD = self.shared(x_BSD)
        if not self.config.shared_expert_gate:
            return y_BSD
        logit_BS = jnp.matmul(
            x_BSD, self.shared_gate_D[...].astype(x_BSD.dtype), preferred_element_type=jnp.float32
        )
        return y_BSD * jax.nn.sigmoid(logit_BS)[..., None].astype(y_BSD.dtype)

    def _routed(
        self, x_BSD: jax.Array, inputs: MoEInputs, intervention: Intervention
    ) -> tuple[jax.Array, LayerReport]:
        """The routed experts' part of the output: router, dropping, experts, report."""
        moe = self.config
        valid_BS = inputs.valid_BS
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        sequence_ids_B = inputs.sequence_ids_B
        if sequence_ids_B is None:
            sequence_ids_B = jnp.arange(len(x_BSD))
        row_kernels = kernels.choose_rows(moe.row_kernels, x_BSD.dtype)
        with jax.named_scope("router"):
            by_token = _by_token(inputs, sequence_ids_B)
            routing, mean_logit_T = self.route(x_TD, by_token, row_kernels, intervention)
        keep_TK = valid_BS.reshape(-1, 1)
        if by_token.replayed is not None:
            # What the recorded run dropped is not sent; the balance terms count it all the same.
            keep_TK &= by_token.replayed.ids < moe.n_choices
        # From here on `assigned` and `kept` are of routed experts, which alone are dispatched.
        assigned, identity = split(unassign(routing, keep_TK, moe.n_choices), moe)
        drop = moe.drop if inputs.rng is not None else moe.evaluation_drop
        if intervention.tokens_alone:
            assert inputs.rng is None, "in training tokens are not alone"
            drop = None
        k = intervention.num_experts_per_tok or moe.num_experts_per_tok
        sizes = dropping.sizes_of(moe)._replace(k=k)
        with jax.named_scope("router"):
            kept, max_kept = self._drop(assigned, valid_BS, sequence_ids_B, drop, sizes)
        with jax.named_scope("dispatch"):
            y_TD, dispatch_report = routed_experts(
                x_TD, kept, self.expert_weights(), moe, row_kernels, max_kept
            )
            if identity is not None:
                y_TD = identity.add(y_TD, x_TD)
        with jax.named_scope("router"):
            ledger = dropping.ledger(
                assigned.ids_TK,
                kept.ids_TK,
                dispatch_report.computed_E,
                len(x_BSD),
                drop,
                sizes,
                row_kernels.count,
            )
            identity_Z = None
            computed = kept
            if identity is not None:
                identity_Z = identity.count(moe)
                computed = identity.join(kept, moe)
            logged = logged_sums(
                routing,
                mean_logit_T,
                kept.ids_TK,
                valid_BS,
                ledger,
                dispatch_report,
                moe,
                identity_Z,
            )
            segment_ids_BS = valid_BS if inputs.segment_ids_BS is None else inputs.segment_ids_BS
            report = LayerReport(
                loss_inputs(routing, segment_ids_BS, moe),
                logged,
                recorded(routing, computed, valid_BS, moe.n_choices),
                x_BSD if intervention.keep_inputs else None,
            )
        return y_TD.reshape(x_BSD.shape), report

    def expert_weights(self) -> experts.ExpertWeights:
        """The weights of the routed experts."""
        quantised = self.config.quantised
        if quantised is None:
            weights = experts.ExpertWeights(
                self.gate_EFD[...], self.up_EFD[...], self.down_EDF[...]
            )
        else:
            held = functools.partial(quantisation.held, self, inputs=quantised.activations)
            weights = experts.ExpertWeights(held("gate_EFD"), held("up_EFD"), held("down_EDF"))
        if not form_of(self.config.expert).biases:
            return weights
        return weights._replace(
            gate_bias_EF=self.gate_bias_EF[...],
            up_bias_EF=self.up_bias_EF[...],
            down_bias_ED=self.down_bias_ED[...],
        )

    def route(
        self,
        x_TD: jax.Array,
        inputs: RouterInputs,
        row_kernels: RowKernels = kernels.JAX_ROWS,
        intervention: Intervention = interventions.NONE,
    ) -> tuple[Routing, jax.Array | None]:
        """The routing of activations, in float32 but for another `logits_dtype` or `gates_dtype`.

        Args:
          x_TD: activations.
          inputs: without the router's variables, which the layer adds.
          row_kernels: the row kernels in use.
          intervention: a change to how the layer is used.

        Returns:
          The routing, and the mean of each token's logits; None for a router that changes the
          logits or has none.

        Raises:
          ValueError: for an intervention that the router would ignore, or a text whose task a
            router by task does not know.
        """
        interventions.check(intervention, self.config)
        router, settings = routers.get_router(self.config)
        if inputs.left_out_E is not None:
            interventions.check_router(self.config)
            assert inputs.rng is None, "in training no expert is left out"
            assert inputs.replayed is None, "a recorded choice cannot do without an expert"
        settings = dataclasses.replace(
            settings,
            k=intervention.num_experts_per_tok or settings.k,
            mask_best=intervention.mask_best,
            top_k=row_kernels.top_k,
        )
        variables = {n: v for n, v in vars(self).items() if isinstance(v, RouterVariable)}
        inputs = inputs._replace(state={name: v[...] for name, v in variables.items()})
        logits = mean_logit_T = None
        if router.by_task:
            _check_tasks_known(inputs, self.config)
        if router.learned and router.by_task:
            logits = self._logits_of_tasks(inputs)
        elif router.learned:
            x_TD = x_TD.astype(jnp.float32)
            if self.config.router.jitter is not None and inputs.rng is not None:
                x_TD, inputs = _jitter(x_TD, inputs, self.config.router.jitter)
            logits, mean_logit_T = self._logits_of_tokens(x_TD, with_mean=not router.alters_logits)
        choose = router.route
        if intervention.tokens_alone and router.alone is not None:
            choose = router.alone
        routing = choose(logits, inputs, settings)
        routing = _rounded(routing, jnp.dtype(self.config.router.gates_dtype))
        if inputs.replayed is not None and inputs.rng is None:
            replayed = inputs.replayed
            routing = routing._replace(ids_TK=replayed.ids, gates_TK=replayed.gates)
        chex.assert_equal_shape([routing.ids_TK, routing.gates_TK])
        chex.assert_type([routing.ids_TK, routing.gates_TK], [jnp.int32, jnp.float32])
        return routing, mean_logit_T

    def _logits_of_tokens(
        self, x_TD: jax.Array, *, with_mean: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """The router matrix times each token, and the mean of each token's logits if wanted."""
        # At highest precision: an accelerator's default would round to bfloat16.
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        dtype = jnp.dtype(self.config.router.logits_dtype)
        logits = product("td,ed->te", x_TD.astype(dtype), self.router_ED[...].astype(dtype))
        logits = logits.astype(jnp.float32)
        mean_logit_T = None
        if with_mean:
            # The mean of the logits themselves would make XLA on CPU store the logits.
            mean_D = self.router_ED[...].mean(axis=0)
            mean_logit_T = product("td,d->t", x_TD, mean_D)
        if self.config.router.logits_bias:
            logits += self.router_bias_E[...]
            if mean_logit_T is not None:
                mean_logit_T += self.router_bias_E[...].mean()
        return logits, mean_logit_T

    def _logits_of_tasks(self, inputs: RouterInputs) -> jax.Array:
        """The logits of each token's task, (T, E)."""
        # A product with the task's unit vector: an exact look-up, whose gradient is a product too.
        task_TA = jax.nn.one_hot(inputs.task_ids_T, len(self.config.router.tasks))
        return jnp.matmul(task_TA, self.router_EA[...].T, precision="highest")

    def _drop(
        self,
        routing: Routing,
        valid_BS: jax.Array,
        sequence_ids_B: jax.Array,
        drop: DropConfig | None,
        sizes: Sizes,
    ) -> tuple[Routing, int | None]:
        """The routing after dropping, and the most assignments of a shard on a device, if known."""
        if drop is None:
            return routing, None
        valid_T = valid_BS.reshape(-1)
        name = self.config.dispatch.name
        if not dispatch.choose_dispatcher(name, expert_devices()).drops_by_shard:
            return dropping.drop(routing, sequence_ids_B, drop, sizes, valid_T=valid_T), None
        # Buffers of fixed size need a bound for each shard, so each shard drops for itself.
        shards = batch_shards()
        b, s = valid_BS.shape
        kept = dropping.drop(routing, sequence_ids_B, drop, sizes, shards, valid_T)
        return kept, dropping.max_kept((b // shards, s), drop, sizes, expert_devices())


def check_layer(moe: MoEConfig) -> None:
    """Refuses unknown names, and settings that do not fit together.

    Raises:
      ValueError: naming the key, the value and what would be right.
    """
    if not moe.n_routed_experts:
        return
    router, _ = routers.get_router(moe)
    dropping.check_policies(moe, scored=router.learned)
    dispatch.check_dispatcher(moe)
    quantised = moe.quantised is not None
    experts.check_backend(moe.expert_backend, form_of(moe.expert), quantised=quantised)
    kernels.check_rows(moe.row_kernels)
    losses.check(moe, moe.router.name, learned=router.learned, balanced=router.balanced)


def evaluated_together(moe: MoEConfig) -> bool:
    """Whether a token's experts depend, in evaluation, on the other tokens of its batch."""
    if not moe.n_routed_experts:
        return False
    return moe.evaluation_drop is not None or routers.get_router(moe)[0].alone is not None


def _rounded(routing: Routing, dtype: jnp.dtype) -> Routing:
    """A routing whose gates are numbers of another dtype, in float32."""
    if dtype == jnp.float32:
        return routing
    return routing._replace(gates_TK=routing.gates_TK.astype(dtype).astype(jnp.float32))


def _by_token(inputs: MoEInputs, sequence_ids_B: jax.Array) -> RouterInputs:
    """The router's inputs: those of the layer, with B and S as one axis of tokens."""
    replayed = inputs.replayed
    if replayed is not None:
        replayed = RecordedRouting(*(a.reshape(-1, a.shape[-1]) for a in replayed))
    return RouterInputs(
        inputs.token_ids_BS.reshape(-1),
        inputs.valid_BS.reshape(-1),
        inputs.rng,
        replayed=replayed,
        sequence_ids_B=sequence_ids_B,
        left_out_E=inputs.left_out_E,
        task_ids_T=None if inputs.task_ids_BS is None else inputs.task_ids_BS.reshape(-1),
    )


def _check_tasks_known(inputs: RouterInputs, moe: MoEConfig) -> None:
    """Refuses a text without tasks where the router chooses by them."""
    if inputs.task_ids_T is None:
        raise ValueError(
            f"model.moe.router.name={moe.router.name!r}: chooses experts by the task of the text,"
            f" which is not known here; must be one of {', '.join(moe.router.tasks)}"
        )


def _jitter(x_TD: jax.Array, inputs: RouterInputs, width: float) -> tuple[jax.Array, RouterInputs]:
    """The router's input times U(1 - width, 1 + width) (2101.03961 section 2.2), and new inputs."""
    assert inputs.rng is not None, "evaluation is not jittered"
    jitter_rng, rng = jax.random.split(inputs.rng)
    sample = functools.partial(jax.random.uniform, minval=1 - width, maxval=1 + width)
    x_TD *= inputs._replace(rng=jitter_rng).draw(sample, x_TD.shape[1])
    return x_TD, inputs._replace(rng=rng)
