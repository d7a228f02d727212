"""The families of models that Hugging Face has and we can compute.

A family is its tensors (tables.py) and its config: which of our keys is which of theirs, what our
other keys are in every model of the family, and what theirs must be.  A new family is a line in
`FAMILIES`.

Sources: the released config.json and modelling code of each; the models are V1 (2401.06066), V2
(2405.04434), V3 (2412.19437), Mixtral (2401.04088), OLMoE (2409.02060), Qwen3 (2505.09388), Llama
(2302.13971).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from dsmoe_jax.hf import special, tables
from dsmoe_jax.hf.special import Special
from dsmoe_jax.hf.tables import Table

REQUIRED = object()  # a default: the key must be there


class Key(NamedTuple):
    """A key of a config.json that is one of ours.

    Attributes:
      theirs: its name; where it has had several, the first one is written.
      default: the value, if the file lacks it; `REQUIRED`: it must be there.
      null: our value where theirs is null.
    """

    theirs: str | tuple[str, ...]
    default: Any = REQUIRED
    null: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names that it has had."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


class Family(NamedTuple):
    """A family of models.

    Attributes:
      architecture: the class in transformers.
      layers: tables of a layer.  Where checkpoints differ in how they name the same arrays, each
        is one; the first is written.
      keys: our keys below `model`, by dotted name, and theirs.
      ours: values that our other keys have in every model of the family.
      theirs: keys of theirs that change what a model computes, and the values that we can serve;
        the first is what a config.json without the key means, and is written.
      special: what no pair of keys can say.
      unused: our keys that mean nothing in this family.
      auto_map: where the modelling code is, of a family that transformers itself does not have.
    """

    architecture: str
    layers: tuple[Table, ...]
    keys: Mapping[str, Key]
    ours: Mapping[str, Any] = MappingProxyType({})
    theirs: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    special: tuple[Special, ...] = (special.ROPE,)
    unused: tuple[str, ...] = ()
    auto_map: Mapping[str, str] = MappingProxyType({})


_MODEL = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "num_hidden_layers": Key("num_hidden_layers"),
    "rms_norm_eps": Key("rms_norm_eps"),
    "initializer_range": Key("initializer_range", 0.02),
    "tie_word_embeddings": Key("tie_word_embeddings", False),
    "attention.num_attention_heads": Key("num_attention_heads"),
}
_GROUPED = {"attention.num_key_value_heads": Key("num_key_value_heads", None)}
_LATENT = {
    "attention.options.q_lora_rank": Key("q_lora_rank", null=0),
    "attention.options.kv_lora_rank": Key("kv_lora_rank"),
    "attention.options.qk_nope_head_dim": Key("qk_nope_head_dim"),
    "attention.options.qk_rope_head_dim": Key("qk_rope_head_dim"),
    "attention.options.v_head_dim": Key("v_head_dim"),
}
_DENSE_LAYERS = {"intermediate_size": Key("intermediate_size")}
_DEEPSEEK = _DENSE_LAYERS | {
    "first_k_dense_replace": Key("first_k_dense_replace", 0),
    "moe.n_routed_experts": Key("n_routed_experts"),
    "moe.n_shared_experts": Key("n_shared_experts"),
    "moe.num_experts_per_tok": Key("num_experts_per_tok"),
    "moe.moe_intermediate_size": Key("moe_intermediate_size"),
}
_NORMALISED = {"moe.router.norm_topk_prob": Key("norm_topk_prob", False)}
_SCALED = {"moe.router.routed_scaling_factor": Key("routed_scaling_factor", 1.0)}
_QWEN = (
    _DENSE_LAYERS
    | _NORMALISED
    | {
        "moe.n_routed_experts": Key(("num_experts", "num_local_experts")),
        "moe.num_experts_per_tok": Key("num_experts_per_tok"),
        "moe.moe_intermediate_size": Key("moe_intermediate_size"),
        "mlp_only_layers": Key("mlp_only_layers", (), null=()),
    }
)
_EXPERTS = {
    "moe.num_experts_per_tok": Key("num_experts_per_tok"),
    "moe.moe_intermediate_size": Key("intermediate_size"),
}

# Ours is SwiGLU without biases; a window of attention is not what we have.
_THEIRS = {"hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None)}
_NO_WINDOW = {"sliding_window": (None, 0)}
_NO_WINDOW_IN_USE = {"use_sliding_window": (False, None)}

_NO_SHARED = {"moe.n_shared_experts": 0}
_OF_LATENT = ("attention.head_dim", "attention.num_key_value_heads")
_REMOTE = "deepseek-ai/deepseek-moe-16b-base--"


def _layers(
    attention: Table, feed_forward: Table, experts: Table = tables.EXPERTS
) -> tuple[Table, ...]:
    """The tables of a family, with a tensor for each expert and with all of them in one."""
    common = tables.NORMS + attention + feed_forward
    return common + experts, common + tables.FUSED_EXPERTS


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        layers=_layers(
            tables.LATENT_ATTENTION, tables.DENSE_FFN + tables.SHARED_EXPERTS + tables.ROUTER
        ),
        keys=_MODEL | _LATENT | _DEEPSEEK | _SCALED,
        ours={"attention.name": "latent", "attention.rope_interleaved": True},
        # With norm_topk_prob the released code and transformers compute different things.
        theirs=_THEIRS
        | {"scoring_func": ("softmax",), "norm_topk_prob": (False,), "moe_layer_freq": (1,)},
        special=(special.ROPE, special.V2_GROUPS, special.KEY_VALUE_HEADS),
        unused=_OF_LATENT,
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        layers=_layers(
            tables.LATENT_ATTENTION, tables.DENSE_FFN + tables.SHARED_EXPERTS + tables.ROUTER
        ),
        keys=_MODEL
        | _LATENT
        | _DEEPSEEK
        | _SCALED
        | _NORMALISED
        | {"attention.rope_interleaved": Key("rope_interleave", True)},
        ours={
            "attention.name": "latent",
            "moe.router.scoring_func": "sigmoid",
            "moe.router.bias_update_speed": 0.0,  # the bias stays as released
        },
        theirs=_THEIRS
        | {
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
            "moe_layer_freq": (1,),
        },
        special=(special.ROPE, special.V3_GROUPS, special.KEY_VALUE_HEADS, special.AHEAD),
        unused=_OF_LATENT,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        layers=(
            tables.NORMS + tables.GROUPED_ATTENTION + tables.MIXTRAL_EXPERTS,
            tables.NORMS + tables.GROUPED_ATTENTION + tables.ROUTER + tables.FUSED_EXPERTS,
        ),
        keys=_MODEL
        | _GROUPED
        | _EXPERTS
        | {"moe.n_routed_experts": Key(("num_local_experts", "num_experts"))},
        ours=_NO_SHARED | {"moe.router.norm_topk_prob": True},
        theirs=_THEIRS | _NO_WINDOW,
        special=(special.ROPE_OF_MIXTRAL, special.HEAD_DIM),
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        layers=_layers(
            tables.GROUPED_ATTENTION, tables.DENSE_FFN + tables.GATED_SHARED_EXPERT + tables.ROUTER
        ),
        keys=_MODEL | _GROUPED | _QWEN | {"attention.options.bias": Key("qkv_bias", True)},
        ours={"moe.shared_expert_gate": True},
        theirs=_THEIRS | _NO_WINDOW_IN_USE,
        special=(special.ROPE, special.HEAD_DIM, special.SPARSE_STEP, special.SHARED_EXPERT),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        layers=_layers(tables.GROUPED_ATTENTION, tables.DENSE_FFN + tables.ROUTER),
        keys=_MODEL | _GROUPED | _QWEN,
        ours=_NO_SHARED | {"attention.options.qk_norm": "head"},
        theirs=_THEIRS | _NO_WINDOW_IN_USE,
        special=(special.ROPE, special.HEAD_DIM, special.SPARSE_STEP),
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        layers=_layers(tables.GROUPED_ATTENTION, tables.ROUTER),
        keys=_MODEL
        | _GROUPED
        | _EXPERTS
        | _NORMALISED
        | {"moe.n_routed_experts": Key(("num_experts", "num_local_experts"))},
        ours=_NO_SHARED | {"attention.options.qk_norm": "all"},
        theirs=_THEIRS | {"clip_qkv": (None,)},
        special=(special.ROPE, special.EVEN_HEADS),
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        layers=(tables.NORMS + tables.GROUPED_ATTENTION + tables.SHARED_AS_DENSE,),
        keys=_MODEL | _GROUPED,
        ours={"moe.n_routed_experts": 0, "moe.num_experts_per_tok": 0},
        theirs=_THEIRS,
        special=(special.ROPE, special.HEAD_DIM, special.DENSE),
    ),
    # Last: where another family expresses a model too, transformers has a class for that one.
    "deepseek": Family(
        architecture="DeepseekForCausalLM",
        layers=_layers(
            tables.GROUPED_ATTENTION, tables.DENSE_FFN + tables.SHARED_EXPERTS + tables.ROUTER
        ),
        keys=_MODEL
        | _GROUPED
        | _DEEPSEEK
        | _NORMALISED
        | {
            "moe_layer_freq": Key("moe_layer_freq", 1),
            "moe.n_shared_experts": Key("n_shared_experts", null=0),
        },
        theirs=_THEIRS | {"scoring_func": ("softmax",)},
        special=(special.ROPE, special.EVEN_HEADS),
        auto_map={
            "AutoConfig": f"{_REMOTE}configuration_deepseek.DeepseekConfig",
            "AutoModelForCausalLM": f"{_REMOTE}modeling_deepseek.DeepseekForCausalLM",
        },
    ),
}
