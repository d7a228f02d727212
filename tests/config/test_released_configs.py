"""Config files of released models: sizes in Hugging Face's classes, and ratios at small scales."""

import pytest

import configs
from configs import base
from dsmoe_jax.config import Config, from_config_dict
from dsmoe_jax.planning import papers

NAMES = [*papers.V2, *papers.V3, *papers.RELEASED]
# Our key -> theirs, where they have it.
SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "rms_norm_eps": "rms_norm_eps",
    "attention.num_attention_heads": "num_attention_heads",
    "attention.num_key_value_heads": "num_key_value_heads",
    "moe.num_experts_per_tok": "num_experts_per_tok",
    "moe.moe_intermediate_size": "moe_intermediate_size",
}
V3 = {
    **{
        key: key
        for key in (
            "first_k_dense_replace",
            "intermediate_size",
            "mtp.num_nextn_predict_layers",
            "moe.n_routed_experts",
            "moe.n_shared_experts",
            "moe.router.norm_topk_prob",
            "moe.router.n_group",
            "moe.router.topk_group",
            "moe.router.routed_scaling_factor",
        )
    },
    "attention.rope_interleaved": "rope_interleave",
}
V3_HEADS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Class -> our file, keys that it has besides, and those of `SAME` whose defaults are another's.
CLASSES = {
    "DeepseekV3Config": ("deepseek_v3", V3, ()),
    "MixtralConfig": (
        "mixtral_8x7b",
        {
            "moe.n_routed_experts": "num_local_experts",
            "moe.moe_intermediate_size": "intermediate_size",
        },
        (),
    ),
    "Qwen2MoeConfig": ("qwen1_5_moe_a2_7b", {"moe.n_routed_experts": "num_experts"}, ()),
    "Qwen3MoeConfig": (
        "qwen3_30b_a3b",
        {"moe.n_routed_experts": "num_local_experts"},
        ("num_hidden_layers",),
    ),
    "OlmoeConfig": (
        "olmoe_1b_7b",
        {"moe.n_routed_experts": "num_experts", "moe.moe_intermediate_size": None},
        (),
    ),
}


def load(name: str, scale: str = "paper") -> Config:
    return from_config_dict(configs.load(name, scale))


def value_of(config: Config, key: str) -> object:
    value = config.model
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", CLASSES)
def test_sizes_are_the_defaults_of_hugging_faces_class(name):
    transformers = pytest.importorskip("transformers")
    file, besides, other = CLASSES[name]
    config, theirs = load(file), getattr(transformers, name)()
    for key, their_key in {**SAME, **besides}.items():
        if their_key is not None and key not in other:
            assert value_of(config, key) == getattr(theirs, their_key.split(".")[-1]), key
    if config.model.attention.name == "latent":
        for key in V3_HEADS:
            assert config.model.attention.options[key] == getattr(theirs, key), key
    if name == "Qwen2MoeConfig":
        assert config.model.moe.shared_width == theirs.shared_expert_intermediate_size
    if name == "OlmoeConfig":  # their default is not the released model's 1024
        assert config.model.moe.moe_intermediate_size == 1024


@pytest.mark.parametrize("name", NAMES)
def test_small_scales_have_the_experts_of_the_paper(name):
    """The same numbers of experts, and their width relative to the model's within 18 %."""
    paper = load(name).model
    for scale in base.SCALES[1:]:
        small = load(name, scale).model
        same = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "router", "balance")
        for key in same:
            assert getattr(small.moe, key) == getattr(paper.moe, key)
        assert (small.first_k_dense_replace > 0) == (paper.first_k_dense_replace > 0)
        assert small.mtp == paper.mtp
        width, wanted = (m.moe.moe_intermediate_size / m.hidden_size for m in (small, paper))
        assert width == pytest.approx(wanted, rel=0.18)
        assert small.attention.name == paper.attention.name
        assert small.attention.rope_scaling is None
