"""The probe of quantised experts: a trained model with weights of few bits, and without training.

Shapes: L MoE layers, T tokens, K activated experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

from dsmoe_jax.analysis.routed_text import route_text
from dsmoe_jax.config import ModelConfig, stage_of
from dsmoe_jax.model import size
from dsmoe_jax.model.build import ModelState, abstract_model
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs.loading import Run
from dsmoe_jax.study.probes import held_out
from dsmoe_jax.surgery.quantising import quantised_config, quantised_state

ROUTED = 1 / 5  # share of the held-out text on which choices are compared


def quantised(
    run: Run,
    intervention: Intervention,
    *,
    bits: int | None,
    activations: bool = False,
    gates: str = "float32",
) -> dict[str, Any]:
    """`probes.held_out` of the model with quantised experts, and below `inside`:

    routing_agreement: share of the chosen experts of the model as it was trained that are chosen
      for the same token, by layer (L,); the layers before it are quantised too.
    weight_bytes, expert_bytes: of all weights, and of the experts.

    Args:
      run: a finished run, of a model with routed experts.
      intervention: in both models.
      bits, activations, gates: as of `surgery quantise`; bits None: as it was trained.
    """
    model = run.model
    config = run.config
    if bits is not None:
        config = quantised_config(config, bits=bits, activations=activations, gates=gates)
        model = _quantised_model(stage_of(config, run.step).config.model, run.model)
    found = held_out(run._replace(model=model), intervention)
    train = stage_of(config, run.step).config.train
    ids_LTK, trained_LTK = (
        route_text(
            of,
            run.corpus,
            max_tokens=max(int(ROUTED * found["tokens"]), 1),
            batch_size=train.global_batch_size // train.accumulation_steps,
            intervention=intervention,
        ).ids_LTK
        for of in (model, run.model)
    )
    held = size.weight_bytes(model.config)
    found["inside"] = {
        "routing_agreement": agreement(trained_LTK, ids_LTK).tolist(),
        "weight_bytes": held.total,
        "expert_bytes": held.routed + held.shared,
    }
    return found


def _quantised_model(config: ModelConfig, model: Transformer) -> Transformer:
    """The model with quantised experts, as its config says."""
    _, params, other = nnx.split(model, nnx.Param, ...)
    state, _ = quantised_state(config, ModelState(params, other))
    return nnx.merge(abstract_model(config), *state)


def agreement(one_LTK: np.ndarray, other_LTK: np.ndarray) -> np.ndarray:
    """Share of the chosen experts that are chosen for the same token in another routing, (L,)."""
    same_LTK = (one_LTK[..., None] == other_LTK[..., None, :]).any(axis=-1)
    return same_LTK.mean(axis=(1, 2))
