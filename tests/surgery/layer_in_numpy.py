"""A dense FFN and an MoE layer in numpy, float64: they know nothing of our code."""

from __future__ import annotations

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def ffn(x_TD, gate_FD, up_FD, down_DF):
    """One SwiGLU."""
    return (silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)) @ down_DF.T


def moe(x_TD, layer, k, *, scoring="softmax", norm=False, scale=1.0, bias_E=0.0):
    """Shared and routed experts, one token and one expert after the other."""
    logits_TE = x_TD @ layer["router_ED"].T
    if scoring == "softmax":
        s_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        s_TE /= s_TE.sum(axis=1, keepdims=True)
    else:
        s_TE = 1 / (1 + np.exp(-logits_TE))
    y_TD = np.zeros_like(x_TD)
    if "shared" in layer:
        y_TD += ffn(x_TD, *(layer["shared"][name] for name in ("gate_FD", "up_FD", "down_DF")))
    # Rounded, so that equal rows are equal: ties go to the lower id.
    order_TE = np.argsort(-np.round(s_TE + bias_E, 10), axis=1, kind="stable")[:, :k]
    for t, chosen in enumerate(order_TE):
        total = s_TE[t, chosen].sum() if norm else 1.0
        for e in chosen:
            weights = (layer[name][e] for name in ("gate_EFD", "up_EFD", "down_EDF"))
            y_TD[t] += scale * s_TE[t, e] / total * ffn(x_TD[t], *weights)
    return y_TD
