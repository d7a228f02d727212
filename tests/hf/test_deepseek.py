"""DeepSeekMoE (V1), for which transformers has no class.

The reference is transformers' Llama with V2's MoE layers in it, whose greedy router is V1's; its
tensors are written under the names of the released checkpoint.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from against_transformers import TINY, assert_alike, in_memory, ours, shaken, theirs
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe, DeepseekV2TopkRouter

from dsmoe_jax.hf import loading, saving
from dsmoe_jax.progress import Silent

V1 = {
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
    "rope_scaling": None,
}
VARIATIONS = {
    "as released": {},
    "one expert": {"num_experts_per_tok": 1},
    "one shared expert": {"n_shared_experts": 1},
    "renormalised": {"norm_topk_prob": True},
    "two dense layers": {"first_k_dense_replace": 2, "num_hidden_layers": 3},
    "every second layer": {"moe_layer_freq": 2, "num_hidden_layers": 4},
    "grouped queries": {"num_key_value_heads": 2},
    "slow rotation": {"rope_theta": 50.0, "rms_norm_eps": 0.1},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
}


class Renormalised(DeepseekV2TopkRouter):
    """V1's gates with `norm_topk_prob`."""

    def forward(self, hidden_states):
        logits, gates, ids = super().forward(hidden_states)
        return logits, gates / gates.sum(dim=-1, keepdim=True), ids


def draw(settings):
    torch.manual_seed(0)
    theta = settings["rope_theta"]
    scaling = settings["rope_scaling"] or {"type": "default"}
    config = transformers.LlamaConfig(
        **{**TINY, **settings, "rope_scaling": None},
        rope_parameters={"rope_theta": theta, "rope_type": scaling["type"], **scaling},
    )
    config.num_experts = settings["n_routed_experts"]
    config.topk_method = "greedy"
    config.routed_scaling_factor = 1.0
    config.n_group = config.topk_group = None
    model = transformers.LlamaForCausalLM(config).eval()
    for i, layer in enumerate(model.model.layers):
        if i >= settings["first_k_dense_replace"] and i % settings["moe_layer_freq"] == 0:
            layer.mlp = DeepseekV2Moe(config)
            if settings["norm_topk_prob"]:
                layer.mlp.gate = Renormalised(config)
            for matrix in layer.mlp.parameters():
                torch.nn.init.normal_(matrix, std=0.3)
    return shaken(model)


def released(model):
    """The tensors by their released names: a tensor for each expert."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        start, fused, end = name.partition("experts.gate_up_proj")
        if fused:
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors[f"{start}experts.{e}.gate_proj.weight{end}"] = gate.contiguous()
                tensors[f"{start}experts.{e}.up_proj.weight"] = up.contiguous()
        elif name.endswith("mlp.experts.down_proj"):
            for e, down in enumerate(tensor):
                tensors[name.replace("experts.", f"experts.{e}.") + ".weight"] = down.contiguous()
        else:
            tensors[name] = tensor
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


@pytest.mark.parametrize("name", VARIATIONS)
def test_alike_and_back(name, tmp_path: Path):
    settings = {**V1, **VARIATIONS[name]}
    model = draw(settings)
    about = {key: value for key, value in TINY.items() if key != "attn_implementation"}
    tree = {"model_type": "deepseek", "hidden_act": "silu", **about, **settings}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    tensors = released(model)
    save_file(tensors, tmp_path / "model.safetensors")
    source = loading.open_source(tmp_path)
    state = loading.load_state(source, Silent())
    assert_alike(ours(source, state), theirs(model))
    back = tmp_path / "back"
    back.mkdir()
    destination = saving.describe(source.config, "float32", tree)
    assert destination.tree["model_type"] == "deepseek"
    saving.save(destination, in_memory(state), back, Silent())
    written = load_file(back / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in tensors.items())
    assert loading.open_source(back).config == source.config
