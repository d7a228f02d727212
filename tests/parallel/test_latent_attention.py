"""Latent attention with its heads, latents and sequences split over eight virtual devices.

Shapes: B sequences, S positions, D hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import AttentionConfig, MeshConfig
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.nn import attention
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import make_mesh
from tests.tools.trees import REORDERED, assert_all_below, by_path, relative_errors

pytestmark = pytest.mark.eight_devices

B, S, D = 4, 8, 16
SIZES = {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}  # fmt: skip
CONFIG = AttentionConfig("latent", num_attention_heads=4, options=FrozenDict(SIZES))


def test_values_and_gradients_are_those_of_one_device():
    make = attention.get(CONFIG).module
    graph, params = nnx.split(make(D, 0.3, CONFIG, rms_norm_eps=1e-6, rngs=nnx.Rngs(0)))
    x_BSD = jax.random.normal(jax.random.key(1), (B, S, D))
    positions_BS = jnp.tile(jnp.arange(S), (B, 1))

    def loss(params, x_BSD):
        y_BSD, _ = nnx.merge(graph, params)(x_BSD, positions_BS, attention.CausalMask())
        return jnp.square(y_BSD).sum()

    def run(params, x_BSD):
        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x_BSD)
        return by_path({"loss": value, "params": grads[0], "x": grads[1]})

    alone = {path: np.asarray(x) for path, x in run(params, x_BSD).items()}
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), jax.devices())
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.shardings(params))
        x_BSD = jax.device_put(x_BSD, sharding.batch_sharding(mesh))
        on_mesh = run(params, x_BSD)
    shards = {path: x.sharding.shard_shape(x.shape) for path, x in by_path(params).items()}
    assert shards["['kv_down_ZD'].value"] == (2, 16)
    assert shards["['value_up_NIZ'].value"] == (2, 5, 2)
    assert shards["['key_rope_RD'].value"] == (4, 4)
    assert_all_below(relative_errors(on_mesh, alone), REORDERED)
