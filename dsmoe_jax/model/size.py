"""Costs of a model: parameters, training FLOPs and bytes, counted as the papers count them.

Parameters are counted on the real module, initialised abstractly (nothing is allocated: the 145B
model counts in seconds).  `parameters_by_formula` counts them again from the sizes alone.

With these definitions the counts agree with the digits that DeepSeekMoE prints (V1 tables 1-3, 6, 8
and 9):
- `total` is everything trained: embedding, output head, norms, attention, FFNs and router; but for
  the modules of multi-token prediction, which are `mtp`: papers print the model without them.
- `activated` is `total` without the routed experts a token is not sent to (with identity experts,
  which have no parameters: if all choices are equally likely).  The embedding table
  counts in full (16B: 2.83B with it, 2.62B without; the paper says 2.8B).  V2-Lite's 2.4B are
  without it: `activated_without_embedding`.  A table that is the head too stays.
- `activated`, `expert_activated` and FLOPs of a run in stages are means over its tokens.
- `expert_total` and `expert_activated` are the FFNs of the MoE layers, shared experts included;
  neither the router, the gate of the shared experts nor dense layers.  A dense model's FFN is its
  shared expert.

Letters: n sequence length, L layers, D hidden, V vocabulary, F activated FFN parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flax import nnx

from dsmoe_jax.config import Config, ModelConfig, Stage, stages_of
from dsmoe_jax.model.block import compute_dtype
from dsmoe_jax.model.build import model_shapes
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.nn import attention
from dsmoe_jax.nn.feed_forward import form_of


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; see the module's docstring for what each includes."""

    total: int
    activated: int
    expert_total: int
    expert_activated: int
    mtp: int = 0
    mtp_activated: int = 0
    embedding: int = 0  # of a table that is no head
    routed: int = 0  # of the routed experts

    @property
    def activated_without_embedding(self) -> int:
        """Activated parameters that take part in a product."""
        return self.activated - self.embedding


@functools.cache  # an experiment asks for each model many times: with every seed, rate and batch
def count_parameters(model: ModelConfig) -> Parameters:
    """Counts the parameters of the real module, by abstract initialisation.

    Raises:
      ValueError: if the module cannot be built from the config.
    """
    sizes = {"routed": 0, "shared": 0, "router": 0, "other": 0}
    mtp = dict(sizes)
    embedding = 0
    for path, param in nnx.to_flat_state(model_shapes(model).params):
        if path == ("embedding_VD",) and not model.tie_word_embeddings:
            embedding = math.prod(param.shape)
        of = mtp if path[0] == "mtp" else sizes
        of[_part(path)] += math.prod(param.shape)
    moe = model.moe
    e = moe.n_routed_experts
    assert not e or sizes["routed"] % e == 0, "routed experts are all of one size"

    def activated(routed: int) -> int:
        return routed * moe.num_experts_per_tok // moe.n_choices if e else 0

    routed_activated = activated(sizes["routed"])
    return Parameters(
        total=sum(sizes.values()),
        activated=sum(sizes.values()) - sizes["routed"] + routed_activated,
        expert_total=sizes["shared"] + sizes["routed"],
        expert_activated=sizes["shared"] + routed_activated,
        mtp=sum(mtp.values()),
        mtp_activated=sum(mtp.values()) - mtp["routed"] + activated(mtp["routed"]),
        embedding=embedding,
        routed=sizes["routed"],
    )


def _part(path: tuple) -> str:
    """The part of the model that a parameter belongs to: ("layers", "moe", "shared", "gate_FD")."""
    if "moe" not in path:
        return "other"
    part = str(path[path.index("moe") + 1])
    if part.startswith(("router", "shared_gate")):
        return "router"
    return "shared" if part == "shared" else "routed"


def parameters_by_formula(model: ModelConfig) -> Parameters:
    """The same numbers from the sizes alone, to check `count_parameters` against."""
    own = _by_formula(model, biases=True)
    if not model.mtp_depth:
        return own
    one, two = (_by_formula(_moe_layers_alone(model, n), biases=True) for n in (1, 2))
    d = model.hidden_size
    around = 2 * d**2 + 3 * d  # projection and norms of a module, beside its block
    return dataclasses.replace(
        own,
        mtp=model.mtp_depth * (two.total - one.total + around),
        mtp_activated=model.mtp_depth * (two.activated - one.activated + around),
    )


def _by_formula(model: ModelConfig, *, biases: bool) -> Parameters:
    """`parameters_by_formula`, if `biases` are False without those that take part in no product.

    They are the biases of the FFNs and routers, and the matrix of a router by task.
    """
    moe = model.moe
    d = model.hidden_size
    layers = model.num_hidden_layers
    moe_layers = len(model.moe_layers)
    attentions = layers * attention.get(model.attention).parameters(d, model.attention)
    embedding_and_head = (1 if model.tie_word_embeddings else 2) * model.vocab_size * d
    norms = d * (2 * layers + 1)
    has_biases = biases and form_of(moe.expert).biases

    def ffn(width: int) -> int:
        return 3 * d * width + has_biases * (2 * width + d)

    dense = model.n_dense_layers * ffn(model.intermediate_size)
    router = moe_layers * _router_parameters(model, biases=biases)
    outside = attentions + embedding_and_head + norms + dense + router
    expert = moe_layers * ffn(moe.moe_intermediate_size)
    shared = moe_layers * ffn(moe.shared_width) if moe.n_shared_experts else 0
    expert_total = shared + expert * moe.n_routed_experts
    expert_activated = shared
    if moe.n_routed_experts:
        routed = expert * moe.n_routed_experts
        expert_activated += routed * moe.num_experts_per_tok // moe.n_choices
    return Parameters(
        outside + expert_total,
        outside + expert_activated,
        expert_total,
        expert_activated,
        embedding=0 if model.tie_word_embeddings else model.vocab_size * d,
        routed=expert * moe.n_routed_experts,
    )


def _moe_layers_alone(model: ModelConfig, n: int) -> ModelConfig:
    """The model with n layers, all with an MoE layer: two of these differ by MoE layers alone."""
    return dataclasses.replace(
        model,
        num_hidden_layers=n,
        first_k_dense_replace=0,
        moe_layer_freq=1,
        moe_layer_offset=0,
        mlp_only_layers=(),
        mtp=None,
    )


def _of_modules(config: Config, cost: Callable[[Config], float], of_product: float) -> float:
    """Cost of the modules of multi-token prediction.

    Args:
      config: of the run.
      cost: of the model without them, from its config.
      of_product: cost for each parameter of a matrix product.
    """
    model = config.model
    if not model.mtp_depth:
        return 0
    one, two = (
        cost(dataclasses.replace(config, model=_moe_layers_alone(model, n))) for n in (1, 2)
    )
    d = model.hidden_size
    return model.mtp_depth * (two - one + of_product * (2 * d**2 + model.vocab_size * d))


def _router_parameters(model: ModelConfig, *, biases: bool) -> int:
    """Those of a layer's router, and of the gate of its shared experts."""
    moe = model.moe
    d = model.hidden_size
    gate = d if moe.shared_expert_gate else 0
    if not moe.n_routed_experts:
        return gate
    router = get_router(moe)[0]
    logits = moe.n_choices * router.logits_per_expert
    if router.by_task:
        return gate + (logits * len(moe.router.tasks) if biases else 0)
    return gate + logits * (d + (biases and moe.router.logits_bias))


def mean_over_tokens(stages: Sequence[Stage], values: Sequence[float]) -> float:
    """Mean of a figure over the tokens of a run, from its value in each stage."""
    if len(set(values)) == 1:
        return values[0]  # a whole number stays one
    tokens = [stage.tokens for stage in stages]
    return sum(n * value for n, value in zip(tokens, values, strict=True)) / sum(tokens)


def most_work(config: Config) -> Stage:
    """The stage of a run whose steps have the most FLOPs."""
    return max(
        stages_of(config),
        key=lambda stage: train_flops_per_token(stage.config) * stage.config.tokens_per_step,
    )


def flops_per_sequence(config: Config) -> float:
    """Training FLOPs of one sequence as the paper counts them ("FLOPs per 2K / 4K tokens").

        6 n (4 L D^2 + F + V D) + 12 L D n^2

    F is at nominal widths (`nominal_width`, `nominal_dense_width`: shares of a standard FFN of
    8 D^2); attention has full key and value heads and no causal discount; the output head counts,
    router and embedding lookup do not.  Modules of multi-token prediction count as layers that have
    their projection and the head besides.  For comparisons with the paper; what is really computed
    is `train_flops_per_token`.
    """
    stages = stages_of(config)
    return mean_over_tokens(stages, [_flops_per_sequence(stage.config) for stage in stages])


def _flops_per_sequence(config: Config) -> float:
    n = config.data.sequence_length
    model = config.model
    moe = model.moe
    d = model.hidden_size
    layers = model.num_hidden_layers
    shared = moe.shared_width / moe.moe_intermediate_size  # in widths of a routed expert
    experts = shared + moe.computed_per_token
    standard_ffns = (
        model.n_dense_layers * model.nominal_dense_width
        + len(model.moe_layers) * experts * moe.nominal_width
    )
    ffn = 8 * d**2 * standard_ffns
    products = 4 * layers * d**2 + ffn + model.vocab_size * d
    of_modules = _of_modules(config, _flops_per_sequence, 6 * n)
    return 6 * n * products + 12 * layers * d * n**2 + of_modules


def train_flops_per_token(config: Config) -> float:
    """Training FLOPs of one token at the widths really used: the numerator of MFU.

    Forward and backward are 6 FLOPs per activated parameter that takes part in a matrix product
    (router included; embedding lookup, norms and biases not), plus what attention adds for scores
    and values: with full heads 12 L n (heads x head size), without a causal discount as is usual
    (PaLM, 2204.02311, appendix B).  What rematerialisation or padding computes on top is not
    counted.
    """
    stages = stages_of(config)
    return mean_over_tokens(stages, [_train_flops_per_token(stage.config) for stage in stages])


def _train_flops_per_token(config: Config) -> float:
    n = config.data.sequence_length
    model = config.model
    d = model.hidden_size
    layers = model.num_hidden_layers
    lookup = 0 if model.tie_word_embeddings else model.vocab_size * d  # a tied one is the head too
    no_matmul = lookup + d * (2 * layers + 1)
    matmul = _by_formula(model, biases=False).activated - no_matmul
    scores = layers * attention.get(model.attention).train_flops(model.attention, n)
    return 6 * matmul + scores + _of_modules(config, _train_flops_per_token, 6)


def decode_flops_per_token(model: ModelConfig, context: int) -> float:
    """FLOPs of one new token in generation, with a cache of `context` tokens.

    2 for each activated parameter that takes part in a product, as `train_flops_per_token` counts
    them, and scores and values of all layers.  Nothing for multi-token prediction.
    """
    d = model.hidden_size
    lookup = 0 if model.tie_word_embeddings else model.vocab_size * d
    norms = d * (2 * model.num_hidden_layers + 1)
    matmul = _by_formula(model, biases=False).activated - lookup - norms
    scores = model.num_hidden_layers * attention.decode_flops(model.attention, context)
    return 2 * matmul + scores


def cache_bytes_per_token(model: ModelConfig) -> int:
    """Bytes that all layers' caches hold for one token of one sequence in generation.

    In the dtype of activations; which "auto" is on the machine where this runs.

    Raises:
      ValueError: for an attention that cannot be.
    """
    one_layer = attention.cache_bytes(model.attention, compute_dtype(model))
    return model.num_hidden_layers * one_layer


class WeightBytes(NamedTuple):
    """Bytes of a model's weights, without modules of multi-token prediction.

    Attributes:
      routed: of the routed experts.
      shared: of the shared ones.
      others: of all else.
    """

    routed: float
    shared: float
    others: float

    @property
    def total(self) -> float:
        """Bytes of all."""
        return sum(self)


def weight_bytes(
    model: ModelConfig, each: float = 4, each_routed: float | None = None
) -> WeightBytes:
    """Bytes of a model's weights; those of quantised experts are what they are stored as.

    Args:
      model: its config.
      each: bytes of a weight that is not quantised; they are stored as float32.
      each_routed: of one of a routed expert; None: the same.
    """
    moe = model.moe
    layers = len(model.moe_layers)
    counted = parameters_by_formula(model)
    each_routed = each if each_routed is None else each_routed
    one = _expert_bytes(model, moe.moe_intermediate_size, each_routed)
    shared = layers * _expert_bytes(model, moe.shared_width, each) if moe.n_shared_experts else 0
    others = each * (counted.total - counted.expert_total)
    return WeightBytes(layers * moe.n_routed_experts * one, shared, others)


def _expert_bytes(model: ModelConfig, width: int, each: float) -> float:
    """Bytes of an expert of a width: matrices, biases if it has them, scales if it is quantised."""
    d = model.hidden_size
    outputs = 2 * width + d
    biases = form_of(model.moe.expert).biases * outputs * each
    if model.moe.quantised is None:
        return 3 * d * width * each + biases
    return 3 * d * width + 4 * outputs + biases  # a byte each, and a float32 scale an output


def state_bytes(parameters: int) -> dict[str, int]:
    """Bytes of training state, all float32: parameters, the two Adam moments, gradients."""
    return {
        "parameters": 4 * parameters,
        "optimizer": 8 * parameters,
        "gradients": 4 * parameters,
    }


def account(config: Config) -> dict[str, float]:
    """The figures that the paper prints of a model: its parameters and `flops_per_sequence`."""
    stages = stages_of(config)
    figures = [_account(stage.config) for stage in stages]
    return {name: mean_over_tokens(stages, [f[name] for f in figures]) for name in figures[0]}


def _account(config: Config) -> dict[str, float]:
    parameters = count_parameters(config.model)
    return {
        **dataclasses.asdict(parameters),
        "activated_without_embedding": parameters.activated_without_embedding,
        "flops_per_sequence": _flops_per_sequence(config),
    }
