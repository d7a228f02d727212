"""The layer against Hugging Face's OLMoE, which routes as V1 does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs
from tests.tools.tiny import tiny


@pytest.mark.parametrize("renormalise", [False, True])
def test_softmax_over_all_experts_and_topk(renormalise):
    """Gates renormalised or not."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    overrides = {
        "model.moe.n_shared_experts": 0,
        "model.moe.n_routed_experts": 6,
        "model.moe.router.norm_topk_prob": renormalise,
    }
    moe = tiny(**overrides).model.moe
    layer = MoELayer(moe, hidden_size=32, vocab_size=64, initializer_range=0.1, rngs=nnx.Rngs(1))
    theirs = OlmoeSparseMoeBlock(
        OlmoeConfig(
            hidden_size=32,
            intermediate_size=16,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=renormalise,
            experts_implementation="eager",
        )
    )

    def take(x):
        return torch.tensor(np.asarray(x))

    theirs.gate.weight.data = take(layer.router_ED[...])
    fused = jnp.concatenate([layer.gate_EFD[...], layer.up_EFD[...]], axis=1)
    theirs.experts.gate_up_proj.data = take(fused)
    theirs.experts.down_proj.data = take(layer.down_EDF[...])
    x = jax.random.normal(jax.random.key(3), (2, 7, 32))
    with torch.no_grad():
        want = theirs(take(x))
    want = (want[0] if isinstance(want, tuple) else want).numpy()
    got, _ = layer(x, MoEInputs(jnp.zeros((2, 7), jnp.int32), jnp.ones((2, 7), bool)))
    np.testing.assert_allclose(got, want, atol=1e-5)
