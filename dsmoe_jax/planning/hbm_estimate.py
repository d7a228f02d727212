"""Bytes that a step moves in a chip's HBM, by arithmetic: numbers, times bytes for each.

Bytes for each number were read off the step of 16B compiled for v5p (`aot`, experts on eight chips;
docs/scale.md): the array of every kind of number, times how often XLA reads and writes
it and in which dtype.  They change when the model's code does, and are somewhat different on other
chips and meshes: docs/scale.md has the estimates beside what `aot` finds.

Shapes: T tokens of a micro-batch on one chip, D hidden, F expert width, K activated experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dsmoe_jax.config import Config
from dsmoe_jax.model import layout, remat
from dsmoe_jax.moe.dispatch import volume
from dsmoe_jax.nn import attention
from dsmoe_jax.nn.kept import RECEIVED
from dsmoe_jax.parallel.mesh import BATCH_AXES


class _Bytes(NamedTuple):
    """Bytes of HBM for each number, in a forward and in a backward pass of a layer."""

    forward: float
    backward: float


# Of attention, a head, a query and a key, where a kernel keeps them in HBM; as XLA compiled it.
_SCORE = _Bytes(16, 24)
# Of the rows that experts compute.  Blocks of rows compute the forward pass again by themselves, so
# that these are not recomputed with the layer.
_ROW_D = _Bytes(22, 34)
_ROW_F = _Bytes(17, 38)
_EXCHANGED = _Bytes(42, 61)  # of the vectors sent, received, and summed where they are received
_EXPERT = 45  # of an expert's weights: the sums of gradients that blocks of rows add to
_TOKEN_D = _Bytes(
    140, 230
)  # attention without scores, projections, norms, residuals, the choices of its router
_DENSE_F = _Bytes(8, 20)  # of experts that every token visits
_LOGIT = 26  # of the loss in blocks of tokens
_WEIGHT = 18  # gathered and read once a pass, its gradient written and scattered
_STATE_OF_MICRO_BATCH = 19  # of a parameter's shard: its gradient, and the sum of those so far
_STATE_OF_STEP = 48  # of a parameter's shard: it, two moments, the sum of gradients and its norm


def moved(
    config: Config,
    sizes: dict[str, int],
    accumulation_steps: int,
    *,
    local: float,
    in_use: float,
) -> dict[str, float]:
    """GB that a step moves in the HBM of one chip, by category.

    Args:
      config: of the model and its batch.
      sizes: of the mesh's axes.
      accumulation_steps: number of micro-batches.
      local: number of parameters on the chip.
      in_use: number of parameters with which it computes, after FSDP has gathered them.
    """
    model = config.model
    stages = sizes["stage"]
    n_shards = math.prod(sizes[axis] for axis in BATCH_AXES) / stages
    t = config.tokens_per_step / accumulation_steps / n_shards
    layer = _layer(config, t, sizes["tensor"])
    width = model.intermediate_size / sizes["tensor"]
    dense = [*layer, (t * width, _DENSE_F)]
    recomputed = remat.get(model.remat)
    forward_passes = 2 if recomputed.again else 1
    exchanges = 1 if RECEIVED in recomputed.kept else forward_passes
    moe_layers = len(model.moe_layers) + model.mtp_depth
    leading = layout.n_leading(model)
    between = model.n_dense_layers - leading
    rows, exchanged = _rows(config, t, sizes)
    width = model.moe.shared_width / sizes["tensor"]
    shared = [(t * width, _DENSE_F)]
    costs = {
        # The leading dense layers are never rematerialised.
        "attention and projections": moe_layers * _of(layer, forward_passes)
        + between * _of(dense, forward_passes)
        + leading * _of(dense, 1),
        "experts and dispatch": moe_layers
        * (_of(rows, 1) + _of(exchanged, exchanges) + _of(shared, forward_passes)),
        "logits": (1 + model.mtp_depth) * t * model.vocab_size / sizes["tensor"] * _LOGIT,
    }
    # A stage has its share of the layers; embedding and head of all its micro-batches likewise.
    costs = {name: n_bytes / stages for name, n_bytes in costs.items()}
    costs |= {
        "weights": in_use * _WEIGHT + local * _STATE_OF_MICRO_BATCH,
    }
    step = {name: accumulation_steps * n_bytes / 1e9 for name, n_bytes in costs.items()}
    return {**step, "state": local * _STATE_OF_STEP / 1e9}


def _layer(config: Config, t: float, tensor: int) -> list[tuple[float, _Bytes]]:
    """Numbers of what every layer has."""
    model = config.model
    attended = attention.get(model.attention).activations(
        model.attention, config.data.sequence_length
    )
    layer = [(t * model.hidden_size, _TOKEN_D)]
    if attention.kernels.keeps_scores(model.attention.kernel):
        layer.append((t * attended.scores / tensor, _SCORE))
    return layer


def _rows(
    config: Config, t: float, sizes: dict[str, int]
) -> tuple[list[tuple[float, _Bytes]], list[tuple[float, _Bytes]]]:
    """Numbers of the routed experts of a MoE layer, and of the exchange of their rows."""
    model = config.model
    d = model.hidden_size
    f = model.moe.moe_intermediate_size / sizes["tensor"]
    if not model.moe.n_routed_experts:
        return [], []
    rows = volume(model.moe, round(t), sizes["expert"])
    weights = model.moe.n_routed_experts / sizes["expert"] * 3 * d * f
    experts = [
        (rows.computed * d, _ROW_D),
        (rows.computed * f, _ROW_F),
        (weights, _Bytes(0, _EXPERT)),
    ]
    return experts, [(rows.visits * d, _EXCHANGED)]


def _of(numbers: list[tuple[float, _Bytes]], forward_passes: int) -> float:
    """Bytes of a layer in all passes."""
    return sum(n * (forward_passes * each.forward + each.backward) for n, each in numbers)
