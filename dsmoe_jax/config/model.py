"""The section `model` of a config, with `model.attention` and `model.moe` in it."""

from __future__ import annotations

import dataclasses

from dsmoe_jax.config.checks import checker, not_negative, positive
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.config.moe import SCHEDULE_FORM, MoEConfig, Schedule, is_schedule


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies of a longer context than the first; names as in Hugging Face's configs.

    A rope type (dsmoe_jax/nn/attention/rope.py) refuses a setting that it would ignore.  A run that
    ends with a stage of long documents (V2 section 3.1.4) has
    `train.stages.model.attention.rope_scaling.factor = (1.0, 40.0)`.
    """

    factor: float = 1.0  # how many times longer the context is
    rope_type: str = "yarn"  # in dsmoe_jax/nn/attention/rope.py
    original_max_position_embeddings: int | None = None  # positions of the first context
    beta_fast: float = 32.0  # yarn: pairs with more turns in the first context stay as they are
    beta_slow: float = 1.0  # yarn: pairs with fewer turns are slowed by the factor
    truncate: bool = True  # yarn: these limits as whole pairs
    mscale: float | None = None  # yarn: of the rotated parts, over that of mscale_all_dim
    mscale_all_dim: float | None = None  # yarn: latent attention scales its scores by it, too
    attention_factor: float | None = None  # yarn: of the rotated parts, whatever mscale says
    low_freq_factor: float | None = None  # llama3: turns of the slowed pairs
    high_freq_factor: float | None = None  # llama3: turns of the pairs that stay

    def __post_init__(self) -> None:
        at = "model.attention.rope_scaling."
        positive(
            self,
            at,
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "low_freq_factor",
            "high_freq_factor",
        )
        checker(self, at)("factor", self.factor >= 1, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention of all layers.

    `options` are settings of one kind of attention; its entry in dsmoe_jax/nn/attention names them
    and their defaults.  Latent attention has the sizes of its heads there, not in `head_dim`.
    """

    name: str = "grouped"  # in dsmoe_jax/nn/attention
    num_attention_heads: int = 10
    num_key_value_heads: int | None = None  # fewer is grouped-query attention; None: as many
    head_dim: int = 128
    rope_theta: float = 10_000.0
    # Turns the neighbours (2i, 2i + 1) together, as DeepSeek V2 and V3 do, not (i, i + H/2).
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    kernel: str = "auto"  # in dsmoe_jax/nn/attention/kernels, or the best for device and shape
    options: FrozenDict[str, bool | int | float | str] = FrozenDict()

    def __post_init__(self) -> None:
        at = "model.attention."
        check = checker(self, at)
        heads = self.num_attention_heads
        positive(self, at, "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta")
        check(
            "num_key_value_heads",
            heads % (self.num_key_value_heads or heads) == 0,
            f"must divide num_attention_heads={heads}",
        )
        check("head_dim", self.head_dim % 2 == 0, "must be even for RoPE")


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction (V3 section 2.2): modules that predict further tokens in training."""

    num_nextn_predict_layers: int = 1  # modules; the k-th one predicts the token k + 1 ahead
    factor: float = 0.3  # lambda, the weight of their mean loss
    # Multiplies the factor, in the form of a balance term's schedule.  V3: 0.3 for the first 10 of
    # 14.8 T tokens, then 0.1: factor 0.3 and ((0.6757, 1), (0.6757, 0.3333)).
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        at = "model.mtp."
        positive(self, at, "num_nextn_predict_layers")
        not_negative(self, at, "factor")
        ok = self.schedule is None or is_schedule(self.schedule)
        checker(self, at)("schedule", ok, SCHEDULE_FORM)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, RoPE attention, SwiGLU.

    Layer i has an MoE layer as its FFN if

        i >= first_k_dense_replace, i % moe_layer_freq == moe_layer_offset and
        i is not one of mlp_only_layers

    and a dense FFN otherwise.  These are the rules of all open families: DeepSeek's
    `moe_layer_freq`; Qwen's `decoder_sparse_step` s is `moe_layer_freq=s`, `moe_layer_offset=s-1`,
    beside its `mlp_only_layers`; a list of layers leaves out the others by `mlp_only_layers`.
    """

    vocab_size: int = 8192
    hidden_size: int = 1280
    num_hidden_layers: int = 9
    first_k_dense_replace: int = 0  # leading layers whose FFN is dense (16B, 145B: 1)
    moe_layer_freq: int = 1  # one layer in so many has an MoE layer
    moe_layer_offset: int = 0
    mlp_only_layers: tuple[int, ...] = ()  # layers whose FFN is dense in any case
    intermediate_size: int = 3413  # width of the dense layers
    nominal_dense_width: float = 1.0  # the same relative to a standard FFN, for the paper's FLOPs
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False  # one matrix is embedding and output head
    initializer_range: float = 0.006  # standard deviation of every matrix at the start
    # Hidden size of the model for which the deviation and the learning rate are meant; all widths
    # are hidden_size / mup_base_width times that model's: dsmoe_jax/model/mup.py.  None: no muP.
    mup_base_width: int | None = None
    compute_dtype: str = "auto"  # float32 on CPU, bfloat16 on accelerators
    remat: str = "none"  # what the backward pass recomputes: dsmoe_jax/model/remat.py
    # Tokens whose logits a device has at once in training and evaluation (dsmoe_jax/nn/head.py).
    # None: all of them if they take no more than 1 GiB in float32, else as many as do.
    head_block_tokens: int | None = None
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    mtp: MTPConfig | None = None  # None: the next token alone is predicted

    def __post_init__(self) -> None:
        at = "model."
        check = checker(self, at)
        layers = self.num_hidden_layers
        positive(
            self,
            at,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "moe_layer_freq",
            "intermediate_size",
            "nominal_dense_width",
            "rms_norm_eps",
            "initializer_range",
            "mup_base_width",
            "head_block_tokens",
        )
        check(
            "first_k_dense_replace",
            0 <= self.first_k_dense_replace < layers,
            f"must be below num_hidden_layers={layers}; a dense model has n_routed_experts=0",
        )
        check(
            "moe_layer_offset",
            0 <= self.moe_layer_offset < self.moe_layer_freq,
            f"must be 0 or more and below moe_layer_freq={self.moe_layer_freq}",
        )
        check(
            "mlp_only_layers",
            all(0 <= layer < layers for layer in self.mlp_only_layers),
            f"must be layers from 0 to {layers - 1}",
        )
        check(
            "mlp_only_layers",
            bool(self.moe_layers),
            f"with moe_layer_freq={self.moe_layer_freq},"
            f" moe_layer_offset={self.moe_layer_offset} and first_k_dense_replace="
            f"{self.first_k_dense_replace} every layer is dense; one must have an MoE layer",
        )
        dtypes = ("auto", "float32", "bfloat16")
        check("compute_dtype", self.compute_dtype in dtypes, f"must be one of {dtypes}")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers whose FFN is an MoE layer, in order; the others have a dense FFN.

        Reports, records and the routers' states count MoE layers by their place in here.
        """
        return tuple(
            layer
            for layer in range(self.first_k_dense_replace, self.num_hidden_layers)
            if layer % self.moe_layer_freq == self.moe_layer_offset
            and layer not in self.mlp_only_layers
        )

    @property
    def n_dense_layers(self) -> int:
        """Layers with a dense FFN."""
        return self.num_hidden_layers - len(self.moe_layers)

    @property
    def mtp_depth(self) -> int:
        """Modules of multi-token prediction; each has an MoE layer behind those of `moe_layers`."""
        return 0 if self.mtp is None else self.mtp.num_nextn_predict_layers
