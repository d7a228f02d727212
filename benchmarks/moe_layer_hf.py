"""Hugging Face's DeepseekV3MoE on torch, as cases of `benchmarks.moe_layer`.

The module is transformers' own, with our weights. Its gate is replaced by one that chooses the same
experts as ours, its shared expert by nothing, so both compute the same layer.
"""

from typing import Any

import numpy as np
import torch
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from benchmarks.moe_layer import Case
from dsmoe_jax.moe.experts import ExpertWeights


class _Gate(torch.nn.Module):
    """Top-k softmax gate whose choice is shifted by constant offsets."""

    def __init__(self, router_ED: np.ndarray, offsets_TE: np.ndarray, k: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(router_ED))
        self.offsets_TE = torch.tensor(offsets_TE)
        self.k = k

    def forward(self, x_BSD: torch.Tensor):
        logits_TE = torch.nn.functional.linear(x_BSD.flatten(0, 1), self.weight)
        ids_TK = torch.topk(logits_TE.detach() + self.offsets_TE, self.k, dim=-1).indices
        return logits_TE, logits_TE.softmax(-1).gather(1, ids_TK), ids_TK


class _NoSharedExpert(torch.nn.Module):
    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return x_BSD.new_zeros(())


def cases(
    x_TD: np.ndarray,
    dy_TD: np.ndarray,
    router_ED: np.ndarray,
    weights: ExpertWeights,
    offsets: dict[str, np.ndarray],
    k: int,
) -> list[Case]:
    """Forward and forward+gradients for every routing."""
    matrices: list[Any] = [*weights[:3]]
    gate_EFD, up_EFD, down_EDF = matrices
    e, f, d = gate_EFD.shape
    config = DeepseekV3Config(
        hidden_size=d, moe_intermediate_size=f, n_routed_experts=e, n_shared_experts=1,
        num_experts_per_tok=k, n_group=1, topk_group=1,
    )  # fmt: skip
    found = []
    x_BSD = torch.tensor(x_TD[None], requires_grad=True)
    dy_BSD = torch.tensor(dy_TD[None])
    config._experts_implementation = "eager"  # its loop over experts
    moe: Any = DeepseekV3MoE(config)
    moe.shared_experts = _NoSharedExpert()
    with torch.no_grad():
        moe.experts.gate_up_proj.copy_(torch.tensor(np.concatenate([gate_EFD, up_EFD], axis=1)))
        moe.experts.down_proj.copy_(torch.tensor(down_EDF))
    for routing, offsets_TE in offsets.items():
        gate = _Gate(router_ED, offsets_TE, k)

        def forward(gate=gate):
            moe.gate = gate
            with torch.no_grad():
                return moe(x_BSD)

        def with_gradients(gate=gate):
            moe.gate = gate
            y_BSD = moe(x_BSD)
            return y_BSD.detach(), torch.autograd.grad(y_BSD, [x_BSD, *moe.parameters()], dy_BSD)

        found += [
            Case("hf", routing, False, forward),
            Case("hf", routing, True, with_gradients),
        ]
    return found
