"""DeepSeek-V2: latent attention, YaRN, shared experts, groups scored by their best expert."""

import pytest
from against_transformers import assert_round_trip, draw

TINY = {
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 6,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2,
    "beta_slow": 1,
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
VARIATIONS = {
    "V2-Lite": {},
    "compressed queries": {"q_lora_rank": 5},
    "groups": {**GROUPS, "num_experts_per_tok": 3},
    "one group": {**GROUPS, "topk_group": 1},
    "YaRN": {"rope_parameters": YARN},
    "YaRN, mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    "YaRN, two mscales": {
        "q_lora_rank": 5,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "scaled": {"routed_scaling_factor": 16.0},
    "no dense layer": {"first_k_dense_replace": 0},
    "one shared expert": {"n_shared_experts": 1, "num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_alike_and_back(name, tmp_path):
    assert_round_trip(draw("deepseek_v2", **{**TINY, **VARIATIONS[name]}), tmp_path)
