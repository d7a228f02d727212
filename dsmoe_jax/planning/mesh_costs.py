"""Memory and traffic of one chip on a mesh, by arithmetic alone.  Counted are:

- state, exact: float32 parameters, two moments and gradients, split as sharding.py does, and a
  teacher's parameters (its work, a forward pass, and its logits are not counted);
- weights in use: those that FSDP gathers for a layer, twice (the next layer arrives meanwhile), and
  the embedding and the head;
- activations, an estimate: those that rematerialisation keeps of every layer, and the larger of one
  running layer and the logits;
- bytes that the chip's own memory moves, by `hbm_estimate`: those of the rows that come if all
  choices are equally likely, not of the room for the worst case;
- traffic of one step, for each chip: gathered weights and scattered gradients, the exchange of
  tokens between experts, the sums of `tensor`, activations between stages;
- the bubble of a pipeline, as time in which a stage waits (`pipeline_costs`);
- traffic between slices: the gradients of replicas in other slices, which are summed inside of a
  slice before, each chip with its part of them, as XLA does; where stages lie in several slices,
  all that stages send, as it is for the chips at the border.

Shapes: T tokens of a micro-batch on one chip, L layers, D hidden, K activated experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax

from dsmoe_jax.config import Config, ModelConfig
from dsmoe_jax.config.mesh import AXES, across_slices
from dsmoe_jax.model import layout, remat
from dsmoe_jax.model.build import ModelState, model_shapes
from dsmoe_jax.moe import blocks
from dsmoe_jax.moe.dispatch import volume
from dsmoe_jax.nn import attention, head
from dsmoe_jax.nn.kept import ATTENDED, RECEIVED
from dsmoe_jax.parallel.mesh import BATCH_AXES
from dsmoe_jax.parallel.pipeline import Schedule
from dsmoe_jax.parallel.sharding import axes_of, split
from dsmoe_jax.planning import hbm_estimate
from dsmoe_jax.planning.pipeline_costs import Course
from dsmoe_jax.planning.plan import Plan
from dsmoe_jax.training.start import TrainState

_COMPUTE = 2  # bytes: activations and gathered weights are bfloat16
# Bytes for each number in a row of D and of F that the experts' backward pass holds at once: fitted
# to what the compiler allocates (docs/scale.md).
_ROW_D = 19
_ROW_F = 19
INSIDE = tuple(axis for axis in BATCH_AXES if axis != "stage")  # split the micro-batch of a stage
# Arrays at once of the room for results, and of the size of the buffer of received vectors; the
# same, fitted to 16B and 145B on v5p.
_ROOM = 2
_BUFFERED = 9


@dataclasses.dataclass(frozen=True)
class _Array:
    """A parameter.

    Attributes:
      size: number of elements.
      layers: 1 if it is not stacked.
      axes: mesh axes that split it.
      axes_in_use: those that still split it in use, after FSDP has gathered it.
    """

    size: int
    layers: int
    axes: tuple[str, ...]
    axes_in_use: tuple[str, ...]


def n_slices(config: Config) -> int:
    """Slices to plan for: one, unless the config names another number."""
    return max(1, config.mesh.slices)


def n_shards_of(sizes: dict[str, int], axes: Iterable[str]) -> int:
    """Parts into which mesh axes together split a length."""
    return math.prod(sizes[axis] for axis in axes)


def estimate(
    config: Config,
    state: TrainState,
    sizes: dict[str, int],
    accumulation_steps: int,
    teacher: ModelConfig | None = None,
    schedule: Schedule | None = None,
) -> Plan:
    """Memory and traffic of one chip; see the top of this file for what is counted.

    Args:
      config: to plan.
      state: its shapes.
      sizes: of the mesh's axes; those that are not named are 1.
      accumulation_steps: number of micro-batches.
      teacher: see `propose`.
      schedule: of those that pass together through stages; None: all.
    """
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    course = Course.of(sizes["stage"], accumulation_steps, schedule)
    weights = _weights(state, sizes)
    n_shards = n_shards_of(sizes, INSIDE)
    micro_batch = config.train.global_batch_size // accumulation_steps // n_shards
    slices = n_slices(config)
    across = across_slices(sizes, slices)
    inside = sizes["data"] // across["data"]
    t = micro_batch * config.data.sequence_length
    d = config.model.hidden_size
    # Every chip has all weights with which it computes already.
    replicated = n_shards_of(sizes, AXES) == sizes["data"] * sizes["stage"]
    memory = {
        "parameters": 4 * weights.local,
        **_teacher(teacher, sizes),
        "moments": 8 * weights.local,
        # With several micro-batches, their sum and the gradients of the latest one.
        "gradients": (8 if accumulation_steps > 1 else 4) * weights.local,
        "weights in use": 0.0 if replicated else _COMPUTE * weights.in_use,
        "experts of all layers": _COMPUTE * weights.experts if course.gathers_once else 0.0,
        **_activations(config, micro_batch, sizes, course),
        **course.memory(t, d),
    }
    traffic = {
        # Gathered for the forward and the backward pass, then the gradients scattered.
        "weights": _COMPUTE
        * (3 * weights.gathered * course.ticks - weights.experts_gathered * course.spared_ticks),
        "replicas": 2 * 4 * weights.local * (1 - 1 / inside),
        **_exchange(config, micro_batch, sizes, accumulation_steps),
    }
    # Each replica inside of a slice sums its part of the gradients with those of other slices.
    sliced = {"replicas": 2 * 4 * weights.local / inside * (1 - 1 / across["data"])}
    of_stages = sliced if across["stage"] > 1 else traffic
    of_stages |= course.traffic(t, d, weights.local - weights.outside)
    of_stages["replicas"] += 2 * 4 * weights.outside / sizes["data"] * (1 - 1 / sizes["stage"])
    hbm = hbm_estimate.moved(
        config, sizes, accumulation_steps, local=weights.local, in_use=weights.whole
    )
    # In the bubble a stage reads and writes as in any other tick.
    hbm = {name: gb / (1 - course.idle * (name != "state")) for name, gb in hbm.items()}
    passing = None if course.stages == 1 else course.schedule
    return Plan(
        sizes, accumulation_steps, _gb(memory), _gb(traffic), hbm, passing, slices, _gb(sliced)
    )


def _teacher(model: ModelConfig | None, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes of a teacher's parameters, on a mesh that may not divide them: `train` refuses that."""
    return {} if model is None else {"teacher": 4 * _weights(model_shapes(model), sizes).local}


def _gb(costs: dict[str, float]) -> dict[str, float]:
    return {name: n_bytes / 1e9 for name, n_bytes in costs.items() if n_bytes}


class _Weights(NamedTuple):
    """Numbers of elements on one chip.

    Attributes:
      local: its shards of all parameters.
      outside: those of them that are in no stage.
      in_use: gathered at the same time: two layers (the next one arrives meanwhile), and what is
        not in a layer.
      gathered: received to gather each parameter once.
      experts: of the routed experts, all layers together, with which it computes.
      experts_gathered: received to gather these once.
      whole: with which it computes, all layers together.
    """

    local: float
    outside: float
    in_use: float
    gathered: float
    experts: float
    experts_gathered: float
    whole: float


def _weights(state: TrainState | ModelState, sizes: dict[str, int]) -> _Weights:
    local = 0.0
    outside = 0.0
    stacked = 0.0
    unstacked = 0.0
    gathered = 0.0
    experts = 0.0
    experts_gathered = 0.0
    whole = 0.0
    for path, x in jax.tree.leaves_with_path(state.params):
        array = _array(path, x.shape)
        shards = n_shards_of(sizes, array.axes)
        shards_in_use = n_shards_of(sizes, array.axes_in_use)
        in_use = array.size / shards_in_use
        local += array.size / shards
        gathered += in_use * (1 - shards_in_use / shards)
        whole += in_use
        if "E" in axes_of(path, x.shape) and array.layers > 1 and x.ndim > 3:
            experts += in_use
            experts_gathered += in_use * (1 - shards_in_use / shards)
        if array.layers > 1:
            stacked += in_use / (array.layers / sizes["stage"])
        else:
            unstacked += in_use
            outside += array.size / shards
    in_use = 2 * stacked + unstacked
    return _Weights(local, outside, in_use, gathered, experts, experts_gathered, whole)


def _array(path: tuple, shape: tuple[int, ...]) -> _Array:
    letters = axes_of(path, shape)
    layers = shape[0] if letters.startswith("L") else 1
    axes = [axis for axes in split(letters) for axis in axes]
    if len(letters.removeprefix("L")) < 2:
        axes = []
    # FSDP gathers a weight over all axes of the batch; experts are not gathered over `expert`.
    stays = ("stage", "expert", "tensor") if "E" in letters else ("stage", "tensor")
    return _Array(math.prod(shape), layers, tuple(axes), tuple(a for a in axes if a in stays))


def _activations(
    config: Config, micro_batch: int, sizes: dict[str, int], course: Course
) -> dict[str, float]:
    """Bytes on one chip: kept for the backward pass, and of a running layer or the logits."""
    model = config.model
    moe = model.moe
    s = config.data.sequence_length
    t = micro_batch * s
    d = model.hidden_size
    tensor = sizes["tensor"]
    attended = attention.get(model.attention).activations(model.attention, s)
    kept_scores = attention.kernels.keeps_scores(model.attention.kernel)
    scores = kept_scores * t * attended.scores / tensor * (4 + _COMPUTE)
    rows = volume(moe, t, sizes["expert"])
    f = moe.moe_intermediate_size / tensor
    # A running layer: activations of attention and as many gradients, then room for the results of
    # the experts, one block of their rows, and sums of their gradients over blocks.
    layer = 2 * (_COMPUTE * (4 * t * d + t * attended.projected / tensor) + scores)
    layer += _COMPUTE * (_ROOM * rows.room + _BUFFERED * rows.buffered) * d
    layer += blocks.SHARE * rows.computed * (_ROW_D * d + _ROW_F * f)
    layer += 4 * 3 * moe.n_routed_experts / sizes["expert"] * f * d
    layer += t * _ROW_F * moe.shared_width / tensor
    recomputed = remat.get(model.remat)
    stacked = model.num_hidden_layers + model.mtp_depth - layout.n_leading(model)
    layers = course.layers_kept(stacked) + course.leading_kept(model)
    kept = layers * _COMPUTE * t * d
    if ATTENDED in recomputed.kept:
        kept += layers * _COMPUTE * t * attended.result / tensor
    if RECEIVED in recomputed.kept:
        moe_layers = course.layers_kept(len(model.moe_layers) + model.mtp_depth)
        kept += moe_layers * rows.buffered * (_COMPUTE * d + rows.label_bytes)
    if not recomputed.again:  # `dots` keeps less than `none`; counted as `none`
        kept = layers * layer / 2
    at_head = t * course.schedule.micro_batches // course.stages
    n_blocks = head.n_blocks_of_one_device(
        at_head, model.vocab_size, tensor, model.head_block_tokens
    )
    logits = 3 * 4 * at_head * model.vocab_size / tensor / n_blocks
    # A leading layer in front of stages has all sequences of a filling at once.
    leading = 0.0
    if course.stages > 1 and layout.n_leading(model):
        leading = 2 * _COMPUTE * at_head * (4 * d + attended.projected / tensor)
        leading += at_head * _ROW_F * model.intermediate_size / tensor
    # The largest of them: logits are freed before the backward pass reaches the layers, and these
    # before it reaches the leading ones.
    at_work = max(layer, logits, leading)
    return {"activations kept": kept, "a layer at work or logits": at_work}


def _exchange(
    config: Config, micro_batch: int, sizes: dict[str, int], accumulation_steps: int
) -> dict[str, float]:
    """Bytes that one chip receives in a step: exchange of tokens, and sums over `tensor`."""
    model = config.model
    d = model.hidden_size
    t = micro_batch * config.data.sequence_length
    moe_layers = (len(model.moe_layers) + model.mtp_depth) / sizes["stage"]
    rows = volume(model.moe, t, sizes["expert"])
    # Rows go out and back, in the forward and in the backward pass; labels go out only.
    row_trips = 4
    label_trips = 2
    recomputed = remat.get(model.remat)
    if recomputed.again and RECEIVED not in recomputed.kept:  # out again
        row_trips += 1
        label_trips += 1
    bytes_a_row = row_trips * _COMPUTE * d + label_trips * rows.label_bytes
    vectors = _COMPUTE * accumulation_steps * t * d
    layers = (model.num_hidden_layers + model.mtp_depth) / sizes["stage"]
    return {
        "tokens": moe_layers * accumulation_steps * rows.received * bytes_a_row,
        # Two sums a layer each way; a sum is a scatter and a gather.
        "tensor": 8 * layers * vectors * (1 - 1 / sizes["tensor"]),
    }
