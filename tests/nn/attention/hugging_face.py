"""Our attentions beside those of transformers: the same weights under their names.

Every name of theirs is some arrays of ours, one behind the other; as that is linear, gradients go
by the same function.

Shapes: B sequences, S positions, D hidden, N and M heads, H, R, I, Q, Z as in `latent`.
"""

from __future__ import annotations

import jax
import numpy as np


def grouped_names(params: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Weights (or gradients) of grouped attention by their names."""
    d = params["query_NHD"].shape[-1]
    named = {
        "q_proj.weight": params["query_NHD"].reshape(-1, d),
        "k_proj.weight": params["key_MHD"].reshape(-1, d),
        "v_proj.weight": params["value_MHD"].reshape(-1, d),
        "o_proj.weight": params["out_DNH"].reshape(d, -1),
        "q_proj.bias": params.get("query_bias_NH"),
        "k_proj.bias": params.get("key_bias_MH"),
        "v_proj.bias": params.get("value_bias_MH"),
        "q_norm.weight": params.get("query_norm.scale_D"),
        "k_norm.weight": params.get("key_norm.scale_D"),
    }
    bias = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    return {
        name: np.asarray(x).reshape(-1) if name in bias else np.asarray(x)
        for name, x in named.items()
        if x is not None
    }


def latent_names(params: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Weights (or gradients) of latent attention by their names."""
    heads = np.concatenate([params["key_up_NHZ"], params["value_up_NIZ"]], axis=1)
    d = params["kv_down_ZD"].shape[-1]
    named = {
        "kv_a_proj_with_mqa.weight": np.concatenate([params["kv_down_ZD"], params["key_rope_RD"]]),
        "kv_a_layernorm.weight": np.asarray(params["kv_latent_norm.scale_D"]),
        "kv_b_proj.weight": heads.reshape(-1, heads.shape[-1]),
        "o_proj.weight": np.asarray(params["out_DNI"]).reshape(d, -1),
    }
    if "query_NHD" in params:
        queries = np.concatenate([params["query_NHD"], params["query_rope_NRD"]], axis=1)
        return {**named, "q_proj.weight": queries.reshape(-1, d)}
    queries = np.concatenate([params["query_up_NHQ"], params["query_rope_NRQ"]], axis=1)
    return {
        **named,
        "q_a_proj.weight": np.asarray(params["query_down_QD"]),
        "q_a_layernorm.weight": np.asarray(params["query_latent_norm.scale_D"]),
        "q_b_proj.weight": queries.reshape(-1, queries.shape[-1]),
    }
