"""The report finds the layer in which two models differ, and what differs there."""

import numpy as np
import pytest
from against_transformers import TOKENS_BS, draw

from dsmoe_jax.hf import agreement, loading

SETTINGS = {
    "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 12, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "mlp_only_layers": [0],
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    draw("qwen2_moe", **SETTINGS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(directory):
    return agreement.theirs(loading.open_source(directory), TOKENS_BS.astype(np.int32))


def compared(directory, reference, change=None):
    model = loading.load(directory, progress=False)
    if change is not None:
        change(model)
    return agreement.compare(model, reference, TOKENS_BS.astype(np.int32))


def test_the_same_model(directory, reference):
    found = compared(directory, reference)
    assert [row["overlap"] for row in found["layers"]] == [None, 1, 1]
    assert [row["gate_error"] is None for row in found["layers"]] == [True, False, False]
    assert max(row["hidden_error"] for row in found["layers"]) < 1e-5
    assert found["logits_error"] < 1e-4
    assert found["logits_scale"] > 0.3
    text = agreement.table(found).splitlines()
    assert len(text) == 5
    assert text[1].split()[:3] == ["0", "-", "-"]


def test_a_layer_with_another_router(directory, reference):
    def change(model):
        router = model.layers.moe.router_ED
        router[...] = router[...].at[0].set(router[0][::-1])

    layers = compared(directory, reference, change)["layers"]
    assert layers[0]["hidden_error"] < 1e-5
    assert layers[1]["overlap"] < 1
    assert layers[1]["gate_error"] > 1e-3
    assert layers[1]["hidden_error"] > 1e-3
    assert layers[2]["overlap"] == 1
    assert layers[2]["hidden_error"] < 1e-5, "it got the reference's input"


def test_a_model_with_itself(directory):
    """A trace of ours is a reference, too."""
    model = loading.load(directory, progress=False)
    tokens_BS = TOKENS_BS.astype(np.int32)
    found = agreement.compare(model, agreement.trace(model, tokens_BS), tokens_BS)
    assert found["logits_error"] == 0
    assert all(row["hidden_error"] == 0 for row in found["layers"])
