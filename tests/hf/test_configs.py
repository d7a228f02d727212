"""Configs of the project as config.json, and the sentence for those that no family expresses."""

import dataclasses

import pytest

import configs
from dsmoe_jax.config import Config, from_config_dict, replace
from dsmoe_jax.hf.configs import read, write


def model_of(name, arg="paper", **overrides):
    return replace(from_config_dict(configs.load(name, arg)), **overrides).model


def test_the_released_16b():
    """Facts of its config.json."""
    family, tree = write(model_of("dsmoe_16b"))
    assert family == tree["model_type"] == "deepseek"
    assert tree["architectures"] == ["DeepseekForCausalLM"]
    assert set(tree["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    released = {
        "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "scoring_func": "softmax", "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "attention_bias": False,
    }  # fmt: skip
    assert {key: tree[key] for key in released} == released


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("dsmoe_145b", "deepseek"),
        ("llama2_7b", "llama"),
        ("deepseek_67b", "llama"),
        ("dense_2b_x16", "llama"),
        ("deepseek_v2_lite", "deepseek_v2"),
        ("deepseek_v2", "deepseek_v2"),
        ("deepseek_v3", "deepseek_v3"),
        ("mixtral_8x7b", "mixtral"),
        ("olmoe_1b_7b", "olmoe"),
        ("qwen1_5_moe_a2_7b", "qwen2_moe"),
        ("qwen3_30b_a3b", "qwen3_moe"),
    ],
)
def test_of_what_family(name, family):
    model = model_of(name)
    found, tree = write(model)
    assert found == family
    again = read(tree)[1]
    assert write(again).tree == tree
    assert again.attention.num_attention_heads == model.attention.num_attention_heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.moe.router.name": "sinkhorn"}, "model.moe.router.name='sinkhorn' (but 'topk')"),
        (
            {"model.moe.router.routed_scaling_factor": 2.0},
            "model.moe.router.routed_scaling_factor=2.0 (but 1.0)",
        ),
        ({"model.attention.head_dim": 64}, "model.attention.head_dim=64 (but 128)"),
        (
            {"model.moe.router.bias_update_speed": 0.001},
            "model.moe.router.bias_update_speed=True (but False)",
        ),
        ({"model.moe.expert.name": "gpt_oss"}, "model.moe.expert.name='gpt_oss' (but 'swiglu')"),
    ],
)
def test_what_no_family_has(changes, message):
    with pytest.raises(ValueError) as caught:
        write(model_of("dsmoe_2b", **changes))
    assert str(caught.value).startswith("no architecture of Hugging Face expresses this model; ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_has_no_effect_is_no_reason():
    changes = {
        "model.initializer_range": 0.5,
        "model.remat": "full",
        "model.moe.balance.expert": None,
        "model.moe.drop.capacity_factor": 1.0,
        "model.moe.dispatch.chunks": 2,
        "model.moe.router.jitter": 0.01,
    }
    assert write(model_of("dsmoe_2b", **changes)).family == "deepseek"


def test_the_family_that_it_came_from():
    """Mixtral's is one of V1's, too."""
    mixtral = {
        "model.attention.num_attention_heads": 10,
        "model.attention.num_key_value_heads": 5,
        "model.moe.n_shared_experts": 0,
        "model.moe.router.norm_topk_prob": True,
    }
    model = replace(Config(), **mixtral).model
    assert write(model).family == "mixtral"
    assert write(model, "deepseek").family == "deepseek"
    other = dataclasses.replace(model, rms_norm_eps=1e-5)
    assert read(write(other).tree)[1].rms_norm_eps == 1e-5
