"""Compiles an attention layer, forward and backward, for a slice of TPUs; prints the program.

    python -m tests.nn.attention.tpu_program NAME

NAME is of a kernel.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.nn import attention
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.parallel.sharding import spec
from dsmoe_jax.planning.ahead_of_time import slice_devices

B, S, D = 4, 768, 256


def program(kernel: str) -> str:
    """The compiled text, on a mesh that splits the sequences and the heads."""
    config = AttentionConfig(
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, kernel=kernel
    )
    _, devices = slice_devices("v5e:2x2")
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices)
    with jax.set_mesh(mesh):
        make = attention.get(config).module
        layer = nnx.eval_shape(lambda: make(D, 0.02, config, rms_norm_eps=1e-6, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(layer)

        def loss(params, x_BSD, segment_ids_BS):
            positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
            mask = attention.CausalMask(segment_ids_BS)
            y_BSD, _ = nnx.merge(graph, params)(x_BSD, positions_BS, mask)
            return y_BSD.astype(jnp.float32).sum()

        def shape(letters, dtype, *sizes):
            sharding = NamedSharding(mesh, spec(letters))
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        traced = step.trace(params, shape("BSD", "bfloat16", B, S, D), shape("BS", "int32", B, S))
        return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(program(sys.argv[1]))
