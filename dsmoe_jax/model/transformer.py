"""The decoder-only Transformer around the MoE layer.

Leading dense layers are separate modules; the MoE layers are one module whose parameters carry a
leading layer axis, and so are the dense layers between them.  They are run by `jax.lax.scan`, so
compile time does not grow with depth: see `layout` and `scanned`.

Shapes: B sequences, S positions, L key positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import layout, mtp, pipelined, remat
from dsmoe_jax.model.block import (
    Block,
    EveryLayer,
    OneLayer,
    compute_dtype,
    inputs_of_every_layer,
)
from dsmoe_jax.model.layout import Run
from dsmoe_jax.model.mtp import Ahead
from dsmoe_jax.model.scanned import Layers
from dsmoe_jax.model.types import Cache, ModelInputs, Output, RunCache, Scored
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.report import LayerReport
from dsmoe_jax.nn import attention, head
from dsmoe_jax.nn.layers import RMSNorm, init_matrix
from dsmoe_jax.parallel import pipeline
from dsmoe_jax.parallel.pipeline import Schedule
from dsmoe_jax.parallel.sharding import constrain, gathered


class Groups(nnx.Module):
    """The layers of a run (`layout.Run`).  Those of the first one the model itself has."""

    def __init__(self, config: ModelConfig, run: Run, *, rngs: nnx.Rngs):
        self.layers, self.between = _stacks(config, run, rngs)


def _stacks(config: ModelConfig, run: Run, rngs: nnx.Rngs) -> tuple[Block, Block | None]:
    """The MoE layers of a run and its dense ones, each with a leading layer axis."""

    def moe(rngs: nnx.Rngs) -> Block:
        return Block(config, dense=False, rngs=rngs)

    def dense(rngs: nnx.Rngs) -> Block:
        return Block(config, dense=True, rngs=rngs)

    n_dense = run.groups * run.dense
    return _stack(moe, run.groups, rngs), _stack(dense, n_dense, rngs) if n_dense else None


def _stack(make: Callable[[nnx.Rngs], Any], n: int, rngs: nnx.Rngs) -> Any:
    """n modules as one, whose arrays have a leading layer axis."""

    @nnx.split_rngs(splits=n)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> Any:
        return make(rngs)

    return stacked(rngs)


class Transformer(nnx.Module):
    """The model: `Transformer(config, rngs=nnx.Rngs(seed))`; `model(tokens_BS) -> logits_BSV`.

    Raises:
      ValueError: at construction, for an unknown name in the config.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        remat.get(config.remat)
        mtp.check(config)
        self.config = config
        std = config.initializer_range
        n_leading = layout.n_leading(config)
        first, *further = layout.runs(config)
        self.embedding_VD = init_matrix(rngs, (config.vocab_size, config.hidden_size), std)
        self.leading = nnx.List([Block(config, dense=True, rngs=rngs) for _ in range(n_leading)])
        self.layers, self.between = _stacks(config, first, rngs)
        self.further = nnx.List([Groups(config, run, rngs=rngs) for run in further])
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head_VD = init_matrix(rngs, (config.vocab_size, config.hidden_size), std)
        if config.mtp is not None:

            def module(rngs: nnx.Rngs) -> mtp.Module:
                return mtp.Module(config, Block(config, dense=False, rngs=rngs), rngs=rngs)

            self.mtp = _stack(module, config.mtp_depth, rngs)

    @property
    def n_scanned(self) -> int:
        """MoE layers, which are scanned over with the dense layers between them."""
        return len(self.config.moe_layers)

    @property
    def head(self) -> nnx.Param[jax.Array]:
        """The matrix of the output head, (V, D): the embedding if the two are tied."""
        return self.embedding_VD if self.config.tie_word_embeddings else self.head_VD

    def layer(self, number: int) -> Block:
        """A layer by its number, from 0, with parameters of its own."""
        place = layout.places(self.config)[number]
        module: Any = self
        for part in place.path:
            module = module[part] if isinstance(part, int) else getattr(module, part)
        if place.index is None:
            return module
        graph, params = nnx.split(module)
        return nnx.merge(graph, jax.tree.map(operator.itemgetter(place.index), params))

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Logits (float32, B x S x V) of whole single-document sequences."""
        return self.forward(ModelInputs(tokens_BS)).logits_BSV

    def forward(
        self,
        inputs: ModelInputs,
        cache: Cache | None = None,
        intervention: Intervention = interventions.NONE,
    ) -> Output:
        """Runs the model.

        Args:
          inputs: a batch; see `ModelInputs`.
          cache: to continue after the positions it holds.  A sequence is one document, of segment
            1; tokens of segment 0 are padding, which no later token sees.
          intervention: a change to how the MoE layers are used, for probes.
        """
        hidden_BSD, report, cache = self.hidden(inputs, cache, intervention)
        return Output(self.logits(hidden_BSD), report, cache)

    def hidden(
        self,
        inputs: ModelInputs,
        cache: Cache | None = None,
        intervention: Intervention = interventions.NONE,
        schedule: Schedule | None = None,
    ) -> tuple[jax.Array, LayerReport | None, Cache | None]:
        """As `forward`, but (B, S, D) that the head gets, normed, instead of logits."""
        x_BSD, report, cache = self._layers(inputs, cache, intervention, schedule)
        with jax.named_scope("head"):
            return self.final_norm(x_BSD), report, cache

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """Logits of what `hidden` or `draft` returns, float32 (B, S, V)."""
        with jax.named_scope("head"):
            logits_BSV = head.logits(hidden_BSD, self.head)
        chex.assert_shape(logits_BSV, (*hidden_BSD.shape[:2], self.config.vocab_size))
        return logits_BSV

    def draft(
        self,
        k: int,
        hidden_BSD: jax.Array,
        following: ModelInputs,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Runs the k-th module of multi-token prediction as a draft of generation.

        Args:
          k: 1, 2, ...
          hidden_BSD: of `hidden` (k = 1) or of the module before it.
          following: the token k ahead of each position; segment 1 where the position has a token,
            0 where it is padding.
          cache: from `empty_draft_cache`; `length` is the first position here.

        Returns:
          The representation whose logits predict the token k + 1 ahead, and the cache with this
          module's positions filled.
        """
        every = inputs_of_every_layer(following, cache)
        graph, params = nnx.split(self.mtp)
        params, own = jax.tree.map(operator.itemgetter(k - 1), (params, cache.stacked))
        module = nnx.merge(graph, params)
        one = OneLayer(own)
        hidden_BSD, _, own = module(
            hidden_BSD, self._embed(following.tokens_BS), every, one, interventions.GENERATION
        )
        stacked = jax.tree.map(lambda x, new: x.at[k - 1].set(new), cache.stacked, own)
        segment_ids_BL = every.mask.key_segment_ids_BL
        assert segment_ids_BL is not None
        return hidden_BSD, cache._replace(stacked=stacked, segment_ids_BL=segment_ids_BL)

    def score(
        self,
        inputs: ModelInputs,
        targets_BS: jax.Array,
        intervention: Intervention = interventions.NONE,
        *,
        whole_logits: bool = False,
        look_ahead: bool = False,
        with_best: bool = False,
        with_hidden: bool = False,
        schedule: Schedule | None = None,
    ) -> Scored:
        """Runs the model over text whose next tokens are known; see `model.head_block_tokens`.

        Args:
          inputs: a batch; see `ModelInputs`.
          targets_BS: int32, the token after each one.
          intervention: a change to how the MoE layers are used, for probes.
          whole_logits: whether the logits are wanted, whatever they take.
          look_ahead: whether the modules of `model.mtp` are run too.
          with_best: whether the tokens that the model finds best are wanted.
          with_hidden: whether what the head gets is wanted.
          schedule: of the batch on a mesh with stages; None: that of evaluation.
        """
        recorded = inputs.replayed
        if look_ahead:  # of the model's own layers
            own = jax.tree.map(lambda x: x[:, : self.n_scanned], recorded)
            inputs = inputs._replace(replayed=own)
        hidden_BSD, report, _ = self.hidden(inputs, None, intervention, schedule)
        nll_BS, best_BS, logits_BSV = self._predict(
            hidden_BSD,
            targets_BS,
            whole_logits=whole_logits,
            with_best=with_best or look_ahead,
        )
        scored = Scored(nll_BS, logits_BSV, report, None, best_BS)
        if with_hidden:
            scored = scored._replace(hidden_BSD=hidden_BSD)
        if not look_ahead:
            return scored
        assert best_BS is not None
        of_modules = jax.tree.map(lambda x: x[:, self.n_scanned :], recorded)
        inputs = inputs._replace(replayed=of_modules)
        ahead, further = self._look_ahead(hidden_BSD, best_BS, inputs, targets_BS, intervention)
        return scored._replace(report=_joined([report, further]), ahead=ahead)

    def _predict(
        self,
        hidden_BSD: jax.Array,
        targets_BS: jax.Array,
        *,
        whole_logits: bool = False,
        with_best: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Negative log-likelihood of targets; the best tokens if asked for; logits if whole."""
        n_tokens = targets_BS.size
        n_blocks = head.n_blocks(n_tokens, self.config.vocab_size, self.config.head_block_tokens)
        with jax.named_scope("head"):
            if n_blocks > 1 and not whole_logits:
                if with_best:
                    of_tokens = hidden_BSD, self.head, targets_BS, n_blocks
                    return *head.nll_and_best_in_blocks(*of_tokens), None
                return head.nll_in_blocks(hidden_BSD, self.head, targets_BS, n_blocks), None, None
            logits_BSV = head.logits(hidden_BSD, self.head)
            nll_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, targets_BS)
            best_BS = jnp.argmax(logits_BSV, axis=-1) if with_best else None
        return nll_BS, best_BS, logits_BSV

    def _look_ahead(
        self,
        hidden_BSD: jax.Array,
        best_BS: jax.Array,
        inputs: ModelInputs,
        targets_BS: jax.Array,
        intervention: Intervention,
    ) -> tuple[Ahead, LayerReport | None]:
        """Runs the modules of multi-token prediction as one scan.

        Args:
          hidden_BSD: of the model, normed.
          best_BS: the tokens that it finds best.
          inputs: with the modules' recorded routing.
          targets_BS: the token after each one.
          intervention: see `score`.
        """
        every = inputs_of_every_layer(inputs, None)
        depth = self.config.mtp_depth
        ids_BS = every.valid_BS if inputs.segment_ids_BS is None else inputs.segment_ids_BS
        graph, params = nnx.split(self.mtp)

        def run(hidden_BSD, params, one, tokens_BS, ids_BS):
            of_module = every._replace(
                token_ids_BS=tokens_BS, valid_BS=ids_BS > 0, segment_ids_BS=ids_BS
            )
            embedded_BSD = self._embed(tokens_BS)
            module = nnx.merge(graph, params)
            hidden_BSD, report, _ = module(hidden_BSD, embedded_BSD, of_module, one, intervention)
            return hidden_BSD, report

        if (policy := remat.get(self.config.remat).policy) is not None:
            run = jax.checkpoint(run, policy=policy)

        def module(hidden_BSD, scanned):
            of_module, targets_BS, best_BS = scanned
            hidden_BSD, report = run(hidden_BSD, *of_module)
            nll_BS, found_BS, _ = self._predict(hidden_BSD, targets_BS, with_best=True)
            return hidden_BSD, (Ahead(nll_BS, found_BS == best_BS), report)

        rng = inputs.rng
        one = OneLayer(
            rng=None if rng is None else jax.random.split(jax.random.fold_in(rng, 1), depth),
            replayed=jax.tree.map(lambda x: x.swapaxes(0, 1), inputs.replayed),
        )
        tokens_KBS, targets_KBS, best_KBS = (
            mtp.all_ahead(x_BS, depth) for x_BS in (inputs.tokens_BS, targets_BS, best_BS)
        )
        of_modules = params, one, tokens_KBS, mtp.segment_ids(ids_BS.astype(jnp.int32), depth)
        return jax.lax.scan(module, hidden_BSD, (of_modules, targets_KBS, best_KBS))[1]

    def _embed(self, tokens_BS: jax.Array) -> jax.Array:
        """Embeddings of tokens, (B, S, D), in the compute dtype."""
        with jax.named_scope("embedding"):
            table_VD = gathered(self.embedding_VD[...], "VD")
            x_BSD = table_VD[tokens_BS].astype(compute_dtype(self.config))
            return constrain(x_BSD, "BSD")

    def _layers(
        self,
        inputs: ModelInputs,
        cache: Cache | None,
        intervention: Intervention,
        schedule: Schedule | None,
    ) -> tuple[jax.Array, LayerReport | None, Cache | None]:
        """The last layer's output, the report of the MoE layers, and the updated cache."""
        inputs.assert_shapes(self.n_scanned)
        every = inputs_of_every_layer(inputs, cache)
        x_BSD = self._embed(inputs.tokens_BS)
        leading = []
        for i, block in enumerate(self.leading):
            one = OneLayer(cache.leading[i] if cache else None)
            if pipeline.stages() > 1:
                x_BSD, layer_cache = self._rematerialised(block, x_BSD, every), None
            else:
                x_BSD, _, layer_cache = block(x_BSD, every, one)
            leading.append(layer_cache)
        stacks = [self, *self.further]
        rngs = None if inputs.rng is None else jax.random.split(inputs.rng, self.n_scanned)
        replayed = jax.tree.map(lambda x: x.swapaxes(0, 1), inputs.replayed)
        runs = layout.runs(self.config)
        caches = [None] * len(runs) if cache is None else cache.of_runs
        outputs = []
        first = 0
        for stack, run, run_cache in zip(stacks, runs, caches, strict=True):
            of_run = slice(first, first + run.groups)
            first = of_run.stop
            of_layers = jax.tree.map(
                operator.itemgetter(of_run), (rngs, replayed, inputs.left_out_LE)
            )
            moe = OneLayer(run_cache.layers if run_cache else None, *of_layers)
            dense = OneLayer(run_cache.between if run_cache else None)
            layers = Layers(self.config, stack.layers, stack.between, run, intervention)
            if pipeline.stages() > 1:
                if cache is not None:
                    raise ValueError(
                        f"mesh.stage={pipeline.stages()}: generation has no pipeline; must be 1"
                    )
                if schedule is None:
                    schedule = pipelined.schedule_of_evaluation(self.config, len(x_BSD))
                x_BSD, report = layers.in_pipeline(x_BSD, every, moe, schedule)
                outputs.append((report, None))
                continue
            x_BSD, *output = layers.in_order(x_BSD, every, moe, dense)
            outputs.append(output)
        reports, caches = zip(*outputs, strict=True)
        if cache is not None:
            length = cache.length + inputs.tokens_BS.shape[1]
            assert every.mask.key_segment_ids_BL is not None
            segment_ids_BL = every.mask.key_segment_ids_BL
            cache = Cache.of(tuple(leading), caches, length, segment_ids_BL)
        return x_BSD, _joined(reports), cache

    def _rematerialised(self, block: Block, x_BSD: jax.Array, every: EveryLayer) -> jax.Array:
        """A leading layer in front of a pipeline, which keeps as little for the backward pass.

        It has a whole filling at once, whose activations would stay all the while that the
        micro-batches pass through the stages: 9 GB for 16B with 24 sequences (docs/scale.md).
        """
        graph, params = nnx.split(block)

        def layer(x_BSD: jax.Array, params: nnx.State) -> jax.Array:
            return nnx.merge(graph, params)(x_BSD, every, OneLayer())[0]

        policy = remat.get(self.config.remat).policy
        return jax.checkpoint(layer, policy=policy)(x_BSD, params)

    def empty_cache(self, batch: int, max_length: int) -> Cache:
        """A cache for `batch` sequences of up to `max_length` positions, none of them filled."""
        one = self._empty_cache_of_layer(batch, max_length)
        of_runs = [
            RunCache(_repeated(one, run.groups), _repeated(one, run.groups * run.dense))
            for run in layout.runs(self.config)
        ]
        leading = (one,) * len(self.leading)
        return Cache.of(leading, of_runs, jnp.int32(0), _nothing(batch, max_length))

    def empty_draft_cache(self, batch: int, max_length: int) -> Cache:
        """As `empty_cache`, of the modules of multi-token prediction."""
        one = self._empty_cache_of_layer(batch, max_length)
        stacked = _repeated(one, self.config.mtp_depth)
        return Cache((), stacked, jnp.int32(0), _nothing(batch, max_length))

    def _empty_cache_of_layer(self, batch: int, max_length: int) -> Any:
        config = self.config.attention
        empty = attention.get(config).empty_cache
        return empty(config, batch, max_length, compute_dtype(self.config))


def _nothing(batch: int, max_length: int) -> jax.Array:
    """The segments of a cache without tokens, (B, L)."""
    return jnp.zeros((batch, max_length), jnp.int32)


def _repeated(cache: Any, n: int) -> Any:
    """The cache of a layer n times along a new leading axis; None of no layer."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), cache) if n else None


def _together(trees: list[Any]) -> Any:
    """Arrays of several layers along a new leading axis; None of no layer."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees) if trees else None


def _joined(of_runs: Sequence[Any]) -> Any:
    """The reports of all runs with one layer axis."""
    if len(of_runs) == 1:
        return of_runs[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_runs)
