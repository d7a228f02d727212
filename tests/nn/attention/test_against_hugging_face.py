"""Attention layers against those of Hugging Face's models, values and gradients.

Shapes: B sequences, S positions, D hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import AttentionConfig, RopeScaling
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.nn import attention
from tests.nn.attention import hugging_face

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

B, S, D = 2, 40, 24
N, M, H = 4, 2, 6
LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5}
# Of 40 positions the first context has 16; both scales of YaRN differ from 1.
YARN = RopeScaling(
    4.0, original_max_position_embeddings=16, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.4
)
THEIR_YARN = {
    "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.4,
}  # fmt: skip
NO_SCALING = {"rope_type": "default", "rope_theta": 50.0}


def ours(config):
    """A layer whose every parameter is drawn, and its gradients: `(params, x, dy) -> y, grads`."""
    make = attention.get(config).module
    graph, state = nnx.split(
        make(D, 0.3, config, rms_norm_eps=1e-5, rngs=nnx.Rngs(0)), nnx.Param
    )  # fmt: skip
    drawn = {}
    for i, (path, x) in enumerate(nnx.to_flat_state(state)):
        noise = 0.3 * np.asarray(jax.random.normal(jax.random.key(i), x.shape))
        drawn[path] = noise + ("scale_D" in path)

    def run(params, x_BSD):
        state = nnx.from_flat_state({path: nnx.Param(x) for path, x in params.items()})
        positions_BS = jnp.tile(jnp.arange(S), (B, 1))
        return nnx.merge(graph, state)(x_BSD, positions_BS, attention.CausalMask())[0]

    @jax.jit
    def values_and_gradients(params, x_BSD, dy_BSD):
        y_BSD, back = jax.vjp(run, params, x_BSD)
        return y_BSD, *back(dy_BSD)

    return drawn, values_and_gradients


def compare(config, named, theirs, rotary):
    """Values, and gradients of the input and of every weight."""
    params, run = ours(config)
    by_name = named({".".join(path): x for path, x in params.items()})
    weights = dict(theirs.named_parameters())
    assert by_name.keys() == weights.keys()
    for name, weight in weights.items():
        weight.data = torch.tensor(by_name[name])
    x, dy = np.asarray(jax.random.normal(jax.random.key(9), (2, B, S, D)))
    given = torch.tensor(x, requires_grad=True)
    positions = torch.arange(S)[None].repeat(B, 1)
    mask = torch.full((S, S), -torch.inf).triu(1)[None, None]
    want = theirs(
        hidden_states=given, position_embeddings=rotary(given, positions), attention_mask=mask
    )[0]
    want.backward(torch.tensor(dy))
    got, grads, dx = run(params, x, dy)
    assert_near(got, want.detach(), "y")
    assert_near(dx, given.grad, "x")
    for name, grad in named({".".join(path): g for path, g in grads.items()}).items():
        assert_near(grad, weights[name].grad, name)


def assert_near(got, want, name):
    want = want.numpy()
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=1e-4, err_msg=name)


def grouped(**options):
    return AttentionConfig(
        num_attention_heads=N, num_key_value_heads=M, head_dim=H, rope_theta=50.0,
        options=FrozenDict(options),
    )  # fmt: skip


GROUPED = {
    "qwen2_moe": {"bias": True},
    "qwen3_moe": {"qk_norm": "head"},
    "olmoe": {"qk_norm": "all"},
}


@pytest.mark.parametrize("family", GROUPED)
def test_grouped(family):
    """Biases of Qwen1.5-MoE, norms of Qwen3 and OLMoE."""
    name = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe"}[family]
    module = getattr(transformers.models, family)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=M, head_dim=H, rms_norm_eps=1e-5,
        rope_parameters=NO_SCALING, attn_implementation="eager",
    )  # fmt: skip
    modeling = getattr(module, f"modeling_{family}")
    layer = getattr(modeling, f"{name}Attention")(config, 0)
    rotary = getattr(modeling, f"{name}RotaryEmbedding")(config)
    compare(grouped(**GROUPED[family]), hugging_face.grouped_names, layer, rotary)


@pytest.mark.parametrize(
    ("version", "q_lora_rank", "scaled", "interleaved"),
    [(2, 0, False, True), (2, 7, True, True), (3, 7, True, True), (3, 0, False, False)],
)
def test_latent(version, q_lora_rank, scaled, interleaved):
    """DeepSeek V2 turns pairs of neighbours always, V3 as its config says."""
    module = getattr(transformers.models, f"deepseek_v{version}")
    modeling = getattr(module, f"modeling_deepseek_v{version}")
    config = getattr(transformers, f"DeepseekV{version}Config")(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=N, max_position_embeddings=64,
        q_lora_rank=q_lora_rank or None, attn_implementation="eager", **LATENT,
        rope_parameters=dict(THEIR_YARN if scaled else NO_SCALING),
    )  # fmt: skip
    config.rope_interleave = interleaved
    layer = getattr(modeling, f"DeepseekV{version}Attention")(config, 0)
    rotary = getattr(modeling, f"DeepseekV{version}RotaryEmbedding")(config)
    mine = AttentionConfig(
        "latent", num_attention_heads=N, rope_theta=50.0, rope_interleaved=interleaved,
        rope_scaling=YARN if scaled else None,
        options=FrozenDict(q_lora_rank=q_lora_rank, **LATENT),
    )  # fmt: skip
    compare(mine, hugging_face.latent_names, layer, rotary)
