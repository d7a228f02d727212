"""DeepSeek-V3: sigmoid scores with a bias for the choice, groups scored by their two best."""

import numpy as np
import pytest
from against_transformers import assert_round_trip, draw

TINY = {
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 6,
    "q_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 40.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
VARIATIONS = {
    "V3": {},
    "queries not compressed": {"q_lora_rank": None},
    "no groups (Kimi K2)": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    "two groups of four": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
    "gates as they are": {"norm_topk_prob": False},
    "halves of a head rotated": {"rope_interleave": False},
    "YaRN": {"rope_parameters": YARN},
    "YaRN, limits as they are": {"rope_parameters": {**YARN, "truncate": False}},
    "two shared experts": {"n_shared_experts": 2, "routed_scaling_factor": 1.0},
    "no dense layer": {"first_k_dense_replace": 0, "num_hidden_layers": 1},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_alike_and_back(name, tmp_path):
    assert_round_trip(draw("deepseek_v3", **{**TINY, **VARIATIONS[name]}), tmp_path)
