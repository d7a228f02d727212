"""Checkpoints that transformers draws at random and writes, computed by it and by us.

Shapes: B sequences, S positions, T = B*S tokens, V vocabulary, K activated experts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from dsmoe_jax.hf import loading, names, saving
from dsmoe_jax.hf.loading import Source
from dsmoe_jax.hf.tensors import Read
from dsmoe_jax.model.build import ModelState, abstract_model
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.progress import Silent

TOKENS_BS = np.arange(24).reshape(2, 12) ** 2 % 61
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,  # logits of about 1
    "attn_implementation": "eager",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def draw(model_type: str, **settings: Any) -> Any:
    """A model with random weights; those that begin as ones or zeros too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**TINY, **settings})
    return shaken(transformers.AutoModelForCausalLM.from_config(config).eval())


def shaken(model: Any) -> Any:
    """The same model with all its vectors moved by random numbers: scales, biases."""
    with torch.no_grad():
        for name, vector in (*model.named_parameters(), *model.named_buffers()):
            if vector.ndim == 1 and "inv_freq" not in name:
                vector += 0.2 * torch.randn_like(vector)
    return model


def theirs(model: Any) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Logits (B, S, V), and of each MoE layer the chosen experts and gates, (T, K) by expert."""
    found = []
    hooks = [
        module.register_forward_hook(lambda *call: found.append(call[2]))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    with torch.no_grad():
        logits_BSV = model(torch.tensor(TOKENS_BS)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits_BSV, [in_order(ids.numpy(), gates.numpy()) for _, gates, ids in found]


def ours(source: Source, state: ModelState) -> tuple[np.ndarray, list[tuple[np.ndarray, ...]]]:
    """The same of our model."""
    # The quickest to compile; the others are tested against it elsewhere.
    moe = dataclasses.replace(source.config.moe, expert_backend="loop", row_kernels="jax")
    graph = abstract_model(dataclasses.replace(source.config, moe=moe))

    @jax.jit
    def run(state: ModelState, tokens_BS: jax.Array):
        output = nnx.merge(graph, *state).forward(ModelInputs(tokens_BS))
        recorded = None if output.report is None else output.report.recorded
        return output.logits_BSV, recorded

    logits_BSV, recorded = jax.device_get(run(state, jnp.asarray(TOKENS_BS)))
    if recorded is None:
        return logits_BSV, []
    k = recorded.ids.shape[-1]
    layers = zip(recorded.ids.reshape(-1, 24, k), recorded.gates.reshape(-1, 24, k), strict=True)
    return logits_BSV, [in_order(ids_TK, gates_TK) for ids_TK, gates_TK in layers]


def in_order(ids_TK: np.ndarray, gates_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same choice by the number of the expert."""
    order_TK = ids_TK.argsort(axis=1)
    return tuple(np.take_along_axis(x, order_TK, axis=1) for x in (ids_TK, gates_TK))


def assert_alike(a: Any, b: Any) -> None:
    """Logits within 1e-4, the same experts, the same gates."""
    logits_a, routing_a = a
    logits_b, routing_b = b
    np.testing.assert_allclose(logits_a, logits_b, rtol=0, atol=1e-4)
    for (ids_a, gates_a), (ids_b, gates_b) in zip(routing_a, routing_b, strict=True):
        np.testing.assert_array_equal(ids_a, ids_b)
        np.testing.assert_allclose(gates_a, gates_b, rtol=1e-4, atol=1e-6)


def in_memory(state: ModelState) -> Read:
    """Reads parts of arrays that are there as a whole."""
    arrays = {names.path_of(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}
    return lambda path, index: arrays[path][index]


def assert_round_trip(model: Any, directory: Path) -> Source:
    """Theirs -> ours: alike; ours -> theirs: the same bits of every tensor, and the same logits.

    Args:
      model: of transformers.
      directory: empty.

    Returns:
      What was read.
    """
    model.save_pretrained(directory / "theirs")
    source = loading.open_source(directory / "theirs")
    state = loading.load_state(source, Silent())
    logits = theirs(model)
    assert logits[0].std() > 0.3, "at a scale of 1, so that 1e-4 means something"
    assert_alike(ours(source, state), logits)
    back = directory / "back"
    back.mkdir()
    about = {"model_type": model.config.model_type}
    destination = saving.describe(source.config, "float32", about)
    assert destination.tree["model_type"] == model.config.model_type
    saving.save(destination, in_memory(state), back, Silent())
    same = type(model).from_pretrained(back, attn_implementation="eager").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    np.testing.assert_array_equal(theirs(same)[0], logits[0])
    return source
