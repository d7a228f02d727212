"""OLMoE: queries and keys are normalised over all heads.  Llama: a dense model is one of ours."""

import pytest
from against_transformers import assert_round_trip, draw

OLMOE = {"intermediate_size": 8, "num_experts": 6, "num_experts_per_tok": 2}
OLMOE_VARIATIONS = {
    "as it is": {},
    "three experts": {"num_experts_per_tok": 3},
    "one expert": {"num_experts_per_tok": 1},
    "eight of eight": {"num_experts_per_tok": 8, "num_experts": 8},
    "renormalised": {"norm_topk_prob": True},
    "shared keys": {"num_key_value_heads": 2},
    "one key": {"num_key_value_heads": 1},
    "eight heads": {"num_attention_heads": 8},
    "three layers": {"num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 0.1},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LLAMA_VARIATIONS = {
    "as it is": {},
    "grouped queries": {"num_key_value_heads": 2, "head_dim": 8},
    "llama3": {"rope_parameters": LLAMA3, "num_hidden_layers": 3, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", OLMOE_VARIATIONS)
def test_olmoe(name, tmp_path):
    assert_round_trip(draw("olmoe", **{**OLMOE, **OLMOE_VARIATIONS[name]}), tmp_path)


@pytest.mark.parametrize("name", LLAMA_VARIATIONS)
def test_llama(name, tmp_path):
    settings = {"intermediate_size": 24, **LLAMA_VARIATIONS[name]}
    assert_round_trip(draw("llama", **settings), tmp_path)
