"""Mixtral: grouped-query attention, and gates renormalised over the chosen experts."""

import pytest
from against_transformers import assert_round_trip, draw

TINY = {
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
VARIATIONS = {
    "as it is": {},
    "three experts of six": {"num_local_experts": 6, "num_experts_per_tok": 3},
    "a head for each key": {"num_key_value_heads": 4},
    "one key": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 8},
    "three layers": {"num_hidden_layers": 3},
    "slow rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "tied": {"tie_word_embeddings": True},
    "another eps": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_alike_and_back(name, tmp_path):
    assert_round_trip(draw("mixtral", **{**TINY, **VARIATIONS[name]}), tmp_path)
