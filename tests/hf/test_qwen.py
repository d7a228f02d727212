"""Qwen1.5-MoE (qwen2_moe): biases and a gated shared expert; Qwen3-MoE: norms of the heads."""

import pytest
from against_transformers import assert_round_trip, draw

TINY = {
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
BOTH = {
    "as it is": {},
    "renormalised": {"norm_topk_prob": True},
    "first layer dense": {"mlp_only_layers": [0]},
    "last layer dense": {"mlp_only_layers": [2], "num_hidden_layers": 3},
    "every second layer": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "tied": {"tie_word_embeddings": True},
    "slow rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
QWEN2 = BOTH | {
    "no biases": {"qkv_bias": False},
    "a wide shared expert": {"shared_expert_intermediate_size": 32},
}
QWEN3 = BOTH | {
    "wide heads": {"head_dim": 8},
    "YaRN": {"rope_parameters": YARN},
    "one key": {"num_key_value_heads": 1, "rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("name", QWEN2)
def test_qwen2_moe(name, tmp_path):
    settings = {"shared_expert_intermediate_size": 12, **TINY, **QWEN2[name]}
    assert_round_trip(draw("qwen2_moe", **settings), tmp_path)


@pytest.mark.parametrize("name", QWEN3)
def test_qwen3_moe(name, tmp_path):
    assert_round_trip(draw("qwen3_moe", **{**TINY, **QWEN3[name]}), tmp_path)
