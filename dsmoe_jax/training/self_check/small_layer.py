"""The layer of the self-check, of small widths, and what goes into its step.

Shapes: B sequences, S positions, T = B*S tokens, D hidden, K activated per token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsmoe_jax.config import ModelConfig, MoEConfig
from dsmoe_jax.moe import routers
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs, RecordedRouting
from dsmoe_jax.parallel import sharding
from dsmoe_jax.training import router_state

_TILE = 128  # of the kernels: small widths keep the rest that the real ones have


class Arrays(NamedTuple):
    """Inputs of the step on the host, the same in every process.

    Attributes:
      params, other: of the layer.
      x_BSD, dy_BSD: its input, and the gradient of its output.
      inputs: besides the activations, without the random key.
    """

    params: nnx.State
    other: nnx.State
    x_BSD: Any
    dy_BSD: Any
    inputs: MoEInputs


def small_model(model: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model with an MoE layer of small widths that the mesh divides, and no shared expert."""
    sizes = mesh.shape
    moe = dataclasses.replace(
        model.moe,
        moe_intermediate_size=small_width(model.moe.moe_intermediate_size, sizes["tensor"]),
        n_shared_experts=0,
        shared_expert_intermediate_size=None,
        shared_expert_gate=False,
    )
    width = small_width(model.hidden_size, sizes["fsdp"] * sizes["expert"])
    return dataclasses.replace(model, hidden_size=width, moe=moe)


def small_width(real: int, parts: int) -> int:
    """A small width with the same rest: 853 becomes 213, which is as far from whole tiles."""
    step = math.lcm(_TILE, parts)
    return real if real <= step else step + real % step


def _tokens_of_a_part(moe: MoEConfig) -> int:
    """S: so many that a part of the tokens sends each expert two rows, or more."""
    s = max(8, math.ceil(2 * moe.n_routed_experts / moe.num_experts_per_tok))
    return s * moe.dispatch.chunks


def draw_arrays(model: ModelConfig, dtype: jnp.dtype, b: int) -> tuple[nnx.GraphDef, Arrays]:
    """The layer's structure, and arrays drawn from a fixed seed, in numbers of the dtype."""
    moe = model.moe
    rng = np.random.default_rng(0)
    shapes = nnx.eval_shape(
        lambda: MoELayer(
            moe,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            initializer_range=1.0,
            rngs=nnx.Rngs(0),
        )
    )
    graph, params, other = nnx.split(shapes, nnx.Param, ...)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        drawn = scale * rng.standard_normal(shape, np.float32)
        return drawn.astype(dtype).astype(np.float32)

    def weight(x: Any) -> np.ndarray:
        return normal(*x.shape, scale=x.shape[-1] ** -0.5)

    tables = router_state.first_values(model, lambda: np.ones(model.vocab_size, np.int64))

    def variable(path: tuple, x: Any) -> np.ndarray:
        name = str(sharding.parameter_name(path))
        if name in tables:
            return np.asarray(tables[name])
        if jnp.issubdtype(x.dtype, jnp.floating):
            return normal(*x.shape, scale=0.01)  # a bias that has moved
        return np.asarray(first[name])

    router, settings = routers.get_router(moe)
    first = {}
    if router.state is not None:
        first = router.state.first(dataclasses.replace(settings, vocab_size=model.vocab_size))
    params = jax.tree.map(weight, params)
    other = jax.tree.map_with_path(variable, other)
    s = _tokens_of_a_part(moe)
    x_BSD = normal(b, s, model.hidden_size).astype(dtype)
    dy_BSD = normal(b, s, model.hidden_size).astype(dtype)
    valid_BS = np.arange(s) < np.where(np.arange(b) % 3 == 2, s - s // 4, s)[:, None]  # and padding
    on_host: dict[str, Any] = {
        "token_ids_BS": rng.integers(0, model.vocab_size, (b, s), np.int32),
        "valid_BS": valid_BS,
        "sequence_ids_B": np.arange(b, dtype=np.int32),
        "replayed": _recording(moe, router, rng, (b, s)) if router.needs_recording else None,
        "task_ids_BS": rng.integers(0, max(1, len(moe.router.tasks)), (b, s), np.int32),
    }
    return graph, Arrays(params, other, x_BSD, dy_BSD, MoEInputs(**on_host))


def _recording(moe: MoEConfig, router: Any, rng: Any, shape: tuple[int, int]) -> RecordedRouting:
    """A routing to replay: K different experts for each token, with any gates."""
    k = router.columns(moe.n_choices, moe.num_experts_per_tok)
    order_BSE = rng.random((*shape, moe.n_choices)).argsort(axis=-1).astype(np.int32)
    ids_BSK = order_BSE[..., :k]
    gates_BSK = rng.random(ids_BSK.shape, np.float32)
    return RecordedRouting(ids_BSK, gates_BSK, ids_BSK, ids_BSK)


def step_key() -> jax.Array:
    return jax.random.key(0)  # of the step: training draws noise
