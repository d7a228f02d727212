"""The ledger's computed numbers against Hugging Face's models and numbers worked out by hand."""

import pytest
import torch
import transformers

from experiments import source_figures


def parameters(config) -> int:
    """Parameters of Hugging Face's model of this config, without allocating them."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_mixtral_has_the_parameters_of_hugging_faces():
    assert source_figures.parameters(source_figures.MIXTRAL, "total") == parameters(
        transformers.MixtralConfig()
    )


def test_v3_has_the_parameters_of_hugging_faces():
    ours = source_figures.parameters(source_figures.DEEPSEEK_V3, "total")
    assert ours == parameters(transformers.DeepseekV3Config())


def test_v2_has_the_parameters_of_hugging_faces():
    config = transformers.DeepseekV2Config(
        vocab_size=102_400,
        hidden_size=5120,
        intermediate_size=12_288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    ours = source_figures.parameters(source_figures.DEEPSEEK_V2, "total")
    assert ours == parameters(config)


def test_shares_of_the_work():
    """GShard 2B by hand: L = 9, d = 1280, V = 8192, n = 2048; 2 or 32 FFNs of 8 d^2 a layer."""
    n, d = 2048, 1280

    def flops(ffns):
        return 6 * n * (9 * (4 + 8 * ffns) * d**2 + 8192 * d) + 12 * 9 * d * n**2

    expected = 100 * flops(2) / flops(32)
    assert source_figures.two_of_32_of_the_model() == pytest.approx(expected)
    assert source_figures.share_of_experts(source_figures.DEEPSEEK_V3) == 3.125


def test_the_dynamic_router_routes_nothing_as_printed_and_something_as_it_works():
    assert source_figures.dynamic_router_as_printed() == 0
    assert source_figures.dynamic_router_as_it_works() > 0.01


def test_dropping_depends_on_the_rest_of_the_batch():
    assert source_figures.fates_that_depend_on_the_batch() > 0
