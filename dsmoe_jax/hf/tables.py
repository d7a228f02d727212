"""The tensors of a layer as the families of Hugging Face name them: used in both directions.

A line is a tensor: its name there, our axes in each of its dimensions, and the paths of our arrays
within a layer (see `Tensor`).  A line holds for every layer that has its arrays, so one table
serves dense and MoE layers, with biases and without.

Axes: D hidden, F feed-forward width, E routed experts, N query heads, M key/value heads, H head
size; of latent attention R rotated part of a head, I size of a value, Q and Z latents; V
vocabulary; J two hidden vectors side by side.
"""

from __future__ import annotations

from dsmoe_jax.hf.tensors import Tensor

Table = tuple[Tensor, ...]

# Of the model itself.  The head is left out where it is tied to the embedding.
MODEL: Table = (
    Tensor("model.embed_tokens.weight", "V D", ("embedding_VD",)),
    Tensor("model.norm.weight", "D", ("final_norm/scale_D",)),
    Tensor("lm_head.weight", "V D", ("head_VD",)),
)

# Of a module that predicts further tokens, behind the last layer; its block has the names of one.
# Released checkpoints have embedding and head there once more.
AHEAD: Table = (
    Tensor("enorm.weight", "D", ("embedding_norm/scale_D",)),
    Tensor("hnorm.weight", "D", ("hidden_norm/scale_D",)),
    Tensor("eh_proj.weight", "D J", ("projection_DJ",)),
    Tensor("shared_head.norm.weight", "D", ("final_norm/scale_D",)),
)
COPIES = ("embed_tokens.weight", "shared_head.head.weight")

NORMS: Table = (
    Tensor("input_layernorm.weight", "D", ("attention_norm/scale_D",)),
    Tensor("post_attention_layernorm.weight", "D", ("ffn_norm/scale_D",)),
)

GROUPED_ATTENTION: Table = (
    Tensor("self_attn.q_proj.weight", "NH D", ("attention/query_NHD",)),
    Tensor("self_attn.k_proj.weight", "MH D", ("attention/key_MHD",)),
    Tensor("self_attn.v_proj.weight", "MH D", ("attention/value_MHD",)),
    Tensor("self_attn.o_proj.weight", "D NH", ("attention/out_DNH",)),
    Tensor("self_attn.q_proj.bias", "NH", ("attention/query_bias_NH",)),
    Tensor("self_attn.k_proj.bias", "MH", ("attention/key_bias_MH",)),
    Tensor("self_attn.v_proj.bias", "MH", ("attention/value_bias_MH",)),
    Tensor("self_attn.q_norm.weight", "D", ("attention/query_norm/scale_D",)),
    Tensor("self_attn.k_norm.weight", "D", ("attention/key_norm/scale_D",)),
)

_KEYS = ("attention/kv_down_ZD", "attention/key_rope_RD")
_KEYS_AND_VALUES = ("attention/key_up_NHZ", "attention/value_up_NIZ")
_QUERIES = ("attention/query_NHD", "attention/query_rope_NRD")
_QUERIES_UP = ("attention/query_up_NHQ", "attention/query_rope_NRQ")

LATENT_ATTENTION: Table = (
    Tensor("self_attn.q_proj.weight", "NH D", _QUERIES, along=1),
    Tensor("self_attn.q_a_proj.weight", "Q D", ("attention/query_down_QD",)),
    Tensor("self_attn.q_a_layernorm.weight", "Q", ("attention/query_latent_norm/scale_D",)),
    Tensor("self_attn.q_b_proj.weight", "NH Q", _QUERIES_UP, along=1),
    Tensor("self_attn.kv_a_proj_with_mqa.weight", "Z D", _KEYS, along=0),
    Tensor("self_attn.kv_a_layernorm.weight", "Z", ("attention/kv_latent_norm/scale_D",)),
    Tensor("self_attn.kv_b_proj.weight", "NH Z", _KEYS_AND_VALUES, along=1),
    Tensor("self_attn.o_proj.weight", "D NI", ("attention/out_DNI",)),
)

DENSE_FFN: Table = (
    Tensor("mlp.gate_proj.weight", "F D", ("ffn/gate_FD",)),
    Tensor("mlp.up_proj.weight", "F D", ("ffn/up_FD",)),
    Tensor("mlp.down_proj.weight", "D F", ("ffn/down_DF",)),
)

# A dense model of ours is one without routed experts.
SHARED_AS_DENSE: Table = (
    Tensor("mlp.gate_proj.weight", "F D", ("moe/shared/gate_FD",)),
    Tensor("mlp.up_proj.weight", "F D", ("moe/shared/up_FD",)),
    Tensor("mlp.down_proj.weight", "D F", ("moe/shared/down_DF",)),
)

SHARED_EXPERTS: Table = (
    Tensor("mlp.shared_experts.gate_proj.weight", "F D", ("moe/shared/gate_FD",)),
    Tensor("mlp.shared_experts.up_proj.weight", "F D", ("moe/shared/up_FD",)),
    Tensor("mlp.shared_experts.down_proj.weight", "D F", ("moe/shared/down_DF",)),
)

GATED_SHARED_EXPERT: Table = (
    Tensor("mlp.shared_expert.gate_proj.weight", "F D", ("moe/shared/gate_FD",)),
    Tensor("mlp.shared_expert.up_proj.weight", "F D", ("moe/shared/up_FD",)),
    Tensor("mlp.shared_expert.down_proj.weight", "D F", ("moe/shared/down_DF",)),
    Tensor("mlp.shared_expert_gate.weight", "1 D", ("moe/shared_gate_D",)),
)

ROUTER: Table = (
    Tensor("mlp.gate.weight", "E D", ("moe/router_ED",)),
    Tensor("mlp.gate.e_score_correction_bias", "E", ("moe/bias_E",)),
)

# Each expert has tensors of its own in released checkpoints and in what transformers writes.
EXPERTS: Table = (
    Tensor("mlp.experts.{E}.gate_proj.weight", "F D", ("moe/gate_EFD",)),
    Tensor("mlp.experts.{E}.up_proj.weight", "F D", ("moe/up_EFD",)),
    Tensor("mlp.experts.{E}.down_proj.weight", "D F", ("moe/down_EDF",)),
)

# All experts in one, as transformers 5 has them in memory, and writes them when asked to.
FUSED_EXPERTS: Table = (
    Tensor("mlp.experts.gate_up_proj", "E F D", ("moe/gate_EFD", "moe/up_EFD"), along=1),
    Tensor("mlp.experts.down_proj", "E D F", ("moe/down_EDF",)),
)

MIXTRAL_EXPERTS: Table = (
    Tensor("block_sparse_moe.gate.weight", "E D", ("moe/router_ED",)),
    Tensor("block_sparse_moe.experts.{E}.w1.weight", "F D", ("moe/gate_EFD",)),
    Tensor("block_sparse_moe.experts.{E}.w3.weight", "F D", ("moe/up_EFD",)),
    Tensor("block_sparse_moe.experts.{E}.w2.weight", "D F", ("moe/down_EDF",)),
)
