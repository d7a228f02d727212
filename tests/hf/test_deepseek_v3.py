"""DeepSeek-V3: sigmoid scores with a bias for the choice, groups scored by their two best."""

import jax
import numpy as np
import pytest
import torch
from against_transformers import assert_round_trip, draw, in_memory
from safetensors.torch import load_file, save_file

from dsmoe_jax.hf import loading, names, saving
from dsmoe_jax.progress import Silent

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


def test_modules_that_predict_further_tokens(tmp_path):
    """Under the released names, behind the last layer; transformers has no class for them."""
    model = draw("deepseek_v3", **TINY)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    ahead = {
        "model.layers.2." + name.removeprefix("model.layers.1."): torch.randn_like(tensor)
        for name, tensor in tensors.items()
        if name.startswith("model.layers.1.")
    }
    for name, shape in (("enorm", 16), ("hnorm", 16), ("shared_head.norm", 16)):
        ahead[f"model.layers.2.{name}.weight"] = torch.randn(shape)
    ahead["model.layers.2.eh_proj.weight"] = torch.randn(16, 32)
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    copied = {
        f"model.layers.2.{a}.weight": tensors[f"{b}.weight"].clone() for a, b in copies.items()
    }
    save_file({**tensors, **ahead, **copied}, tmp_path / "model.safetensors")
    source = loading.open_source(tmp_path)
    assert source.config.mtp_depth == 1
    state = loading.load_state(source, Silent())
    found = {names.path_of(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}
    for ours, theirs in {
        "mtp/projection_DJ": "eh_proj.weight",
        "mtp/embedding_norm/scale_D": "enorm.weight",
        "mtp/hidden_norm/scale_D": "hnorm.weight",
        "mtp/final_norm/scale_D": "shared_head.norm.weight",
        "mtp/block/moe/bias_E": "mlp.gate.e_score_correction_bias",
    }.items():
        np.testing.assert_array_equal(found[ours][0], ahead[f"model.layers.2.{theirs}"])
    (tmp_path / "back").mkdir()
    destination = saving.describe(source.config, "float32", source.tree)
    saving.save(destination, in_memory(state), tmp_path / "back", Silent())
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() | ahead.keys()
    assert all(torch.equal(x, back[name]) for name, x in {**tensors, **ahead}.items())
