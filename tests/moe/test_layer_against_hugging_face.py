"""The layer against Hugging Face's OLMoE, which routes as V1 does; V3's router against theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs, RouterInputs
from tests.tools.routing import moe_config, route
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


@pytest.mark.parametrize("level", [0.0, -20.0])
@pytest.mark.parametrize("biased", [False, True])
def test_sigmoid_scores_bias_and_groups(biased, level):
    """The choice and the gates of DeepSeek-V3's router, also where all scores are near 0."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    e, d = 8, 16
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(50, d)), rng.normal(size=(e, d), scale=0.3)
    x[:, 0], weight[:, 0] = 1.0, level  # the logits are about this
    bias = np.float32(0.3 * np.exp(min(level, 0)) * rng.normal(size=e) * biased)
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=d,
            n_routed_experts=e,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    )
    theirs.weight.data = torch.tensor(weight, dtype=torch.float32)
    theirs.e_score_correction_bias.data = torch.tensor(bias)
    with torch.no_grad():
        logits, gates, ids = theirs(torch.tensor(x, dtype=torch.float32))
    order = np.argsort(ids.numpy(), axis=1)
    wanted = [np.take_along_axis(a.numpy(), order, axis=1) for a in (ids, gates)]

    moe = moe_config(
        e=e, k=3, scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
        n_group=4, topk_group=2, group_score="top2_sum", bias_update_speed=1e-3 if biased else None,
    )  # fmt: skip
    state = {"bias_E": jnp.asarray(bias)} if biased else {}
    inputs = RouterInputs(jnp.zeros(50, jnp.int32), state=state)
    routing = route(jnp.asarray(logits.numpy()), inputs, moe)
    order = np.argsort(routing.ids_TK, axis=1)
    ids_TK, gates_TK = (
        np.take_along_axis(np.asarray(a), order, axis=1) for a in (routing.ids_TK, routing.gates_TK)
    )
    np.testing.assert_array_equal(ids_TK, wanted[0])
    np.testing.assert_allclose(gates_TK, wanted[1], rtol=1e-5)
