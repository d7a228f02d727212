"""Proposes a mesh for a config on so many chips, by arithmetic alone: nothing is compiled.

Among all meshes that divide the model and the batch and whose memory fits, the one that moves the
fewest bytes.  What is counted:

- state, exact: float32 parameters, two moments and gradients, split as sharding.py does;
- weights in use: what FSDP gathers for a layer, twice (the next one arrives meanwhile), and the
  embedding and the head;
- activations, an estimate: what rematerialisation keeps of every layer, and the larger of one layer
  at work and the logits;
- traffic of one step, for each chip: gathered weights and scattered gradients, the exchange of
  tokens between experts, the sums of `tensor`.

`python -m dsmoe_jax aot` replaces the estimate by what the compiler allocates.

Shapes: T tokens of a micro-batch on one chip, L layers, D hidden, K activated experts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax

from dsmoe_jax.config import Config
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.mesh import AXES
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.moe.dispatch import volume
from dsmoe_jax.parallel.mesh import BATCH_AXES
from dsmoe_jax.parallel.sharding import LOGICAL, axes_of, check, split
from dsmoe_jax.training.step import TrainState, state_shapes

USABLE = 0.9  # the rest is for the program, its buffers, and what the estimate misses
_COMPUTE = 2  # bytes: activations and gathered weights are bfloat16
# Bytes for each number in a row of D and of F that the experts' backward pass holds at once: fitted
# to what the compiler allocates (docs/scale.md).  Most are float32: what leaves a grouped product.
_ROW_D, _ROW_F = 19, 19


@dataclasses.dataclass(frozen=True)
class Plan:
    """A mesh, and what it costs each chip.

    Attributes:
      sizes: of the mesh's axes.
      accumulation_steps: micro-batches of a step.
      memory: GB by category.
      traffic: GB that each chip receives in one step, by category.
    """

    sizes: dict[str, int]
    accumulation_steps: int
    memory: dict[str, float]
    traffic: dict[str, float]

    @property
    def used(self) -> float:
        """GB of memory."""
        return sum(self.memory.values())

    @property
    def moved(self) -> float:
        """GB received in a step."""
        return sum(self.traffic.values())


@dataclasses.dataclass(frozen=True)
class _Array:
    """A parameter: its number of elements, which mesh axes split it, and which still do in use."""

    size: int
    layers: int
    axes: tuple[str, ...]
    axes_in_use: tuple[str, ...]


def propose(config: Config, chip: str, chips: int) -> tuple[Plan, list[Plan]]:
    """The mesh that moves the fewest bytes among those that fit, and all that were looked at.

    Raises:
      ValueError: for an unknown chip, or if no mesh fits; with the numbers of the closest one.
    """
    check_chip(chip)
    state, limit, plans = state_shapes(config), USABLE * CHIPS[chip].hbm_gb, []
    for sizes in meshes(state, chips):
        for accumulation in _accumulations(config, sizes):
            plans.append(estimate(config, state, sizes, accumulation))
            if plans[-1].used <= limit:
                break  # more micro-batches would only gather the weights more often
    if not plans:
        can_be = "; ".join(
            f"{axis} {_numbers(possible(config, state, axis)[0], chips)}" for axis in AXES
        )
        raise ValueError(
            f"--chips={chips}: no mesh of {chips} divides {config.name} and its batch of"
            f" {config.train.global_batch_size} (train.global_batch_size); its axes can be {can_be}"
        )
    smallest = min(plans, key=lambda plan: plan.used)
    _refuse_unless_it_fits(config, chip, smallest, "the least is", "take more chips")
    return min((p for p in plans if p.used <= limit), key=lambda p: (p.moved, p.used)), plans


def examine(config: Config, chip: str, chips: int) -> Plan:
    """What the mesh and the micro-batches of the config itself cost.

    Raises:
      ValueError: for an unknown chip, a mesh that does not divide model or batch, or does not fit.
    """
    check_chip(chip)
    state, sizes = state_shapes(config), config.mesh.sizes(chips)
    check(state.params, sizes)
    shards, n_micro = math.prod(sizes[axis] for axis in BATCH_AXES), config.train.accumulation_steps
    require(
        config.train.global_batch_size % (shards * n_micro) == 0,
        "train.accumulation_steps",
        n_micro,
        f"times data x fsdp x expert = {shards} must divide train.global_batch_size="
        f"{config.train.global_batch_size}",
    )
    plan = estimate(config, state, sizes, n_micro)
    advice = "take more micro-batches (train.accumulation_steps), another mesh, or more chips"
    _refuse_unless_it_fits(config, chip, plan, "it takes", advice)
    return plan


def check_chip(chip: str) -> None:
    """Refuses a chip that is not in the table."""
    if chip not in CHIPS:
        raise ValueError(f"--chip={chip}: must be one of {', '.join(CHIPS)}")


def _refuse_unless_it_fits(config: Config, chip: str, plan: Plan, how: str, advice: str) -> None:
    chips, hbm = math.prod(plan.sizes.values()), CHIPS[chip].hbm_gb
    if plan.used > USABLE * hbm:
        raise ValueError(
            f"--chips={chips}: {config.name} does not fit {chips} {chip} of {hbm} GB"
            f" ({USABLE * hbm:.1f} GB usable): {how} {plan.used:.1f} GB a chip"
            f" ({listing(plan.memory)}) on the mesh {shape(plan.sizes)} with"
            f" {plan.accumulation_steps} micro-batches; {advice}"
        )


def possible(config: Config, state: TrainState, axis: str) -> tuple[list[int], list[str]]:
    """The sizes that a mesh axis can have if it is the only one, and what they must divide."""
    lengths = {"batch": config.train.global_batch_size} if axis in BATCH_AXES else {}
    for path, x in jax.tree.leaves_with_path(state.params):
        letters = axes_of(path, x.shape)
        if len(letters.removeprefix("L")) > 1:
            for letter, length, axes in zip(letters, x.shape, split(letters), strict=True):
                if axis in axes:
                    lengths[f"{LOGICAL[letter].meaning} {length}"] = length
    largest = math.gcd(*lengths.values())
    names = [f"batch of {n}" if name == "batch" else name for name, n in lengths.items()]
    return [n for n in range(1, largest + 1) if largest % n == 0], names


def _numbers(numbers: list[int], limit: int) -> str:
    return ", ".join(str(n) for n in numbers if n <= limit)


def meshes(state: TrainState, chips: int) -> Iterator[dict[str, int]]:
    """All meshes of so many chips that divide the arrays of a state."""
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    for fsdp, expert, tensor in itertools.product(divisors, repeat=3):
        if chips % (fsdp * expert * tensor):
            continue
        data = chips // (fsdp * expert * tensor)
        sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
        try:
            check(state.params, sizes)
        except ValueError:
            continue
        yield sizes


def _accumulations(config: Config, sizes: dict[str, int]) -> list[int]:
    """Numbers of micro-batches that the batch can be cut into, fewest first."""
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    whole, rest = divmod(config.train.global_batch_size, shards)
    if rest:
        return []
    return [n for n in range(1, whole + 1) if whole % n == 0]


def estimate(config: Config, state: TrainState, sizes: dict[str, int], accumulation: int) -> Plan:
    """Memory and traffic of one chip; see the module's docstring for what is counted."""
    arrays = [_array(path, x.shape) for path, x in jax.tree.leaves_with_path(state.params)]
    n = lambda axes: math.prod(sizes[axis] for axis in axes)  # noqa: E731
    local = sum(a.size / n(a.axes) for a in arrays)
    in_use = [a.size / n(a.axes_in_use) for a in arrays]
    stacked = sum(w / a.layers for w, a in zip(in_use, arrays, strict=True) if a.layers > 1)
    unstacked = sum(w for w, a in zip(in_use, arrays, strict=True) if a.layers == 1)
    micro_batch = config.train.global_batch_size // accumulation // n(BATCH_AXES)
    memory = {
        "parameters": 4 * local,
        "moments": 8 * local,
        "gradients": (8 if accumulation > 1 else 4) * local,  # of all micro-batches, and of one
        "weights in use": _COMPUTE * (2 * stacked + unstacked) if n(AXES) > n(("data",)) else 0.0,
        **_activations(config, micro_batch, sizes),
    }
    gathered = sum(
        w * (1 - n(a.axes_in_use) / n(a.axes)) for w, a in zip(in_use, arrays, strict=True)
    )
    traffic = {
        # Gathered for the forward and the backward pass, then the gradients scattered.
        "weights": 3 * _COMPUTE * gathered * accumulation,
        "replicas": 2 * 4 * local * (1 - 1 / sizes["data"]),
        **_exchange(config, micro_batch, sizes, accumulation),
    }
    gb = lambda costs: {name: x / 1e9 for name, x in costs.items() if x}  # noqa: E731
    return Plan(sizes, accumulation, gb(memory), gb(traffic))


def _array(path: tuple, shape: tuple[int, ...]) -> _Array:
    letters = axes_of(path, shape)
    layers = shape[0] if letters.startswith("L") else 1
    axes = [axis for axes in split(letters) for axis in axes]
    if len(letters.removeprefix("L")) < 2:
        axes = []
    # FSDP collects a weight from all axes of the batch, but experts stay where they are.
    stays = ("expert", "tensor") if "E" in letters else ("tensor",)
    return _Array(math.prod(shape), layers, tuple(axes), tuple(a for a in axes if a in stays))


def _activations(config: Config, micro_batch: int, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes on one chip: kept for the backward pass, a layer at work, and logits."""
    model, s, tensor = config.model, config.data.sequence_length, sizes["tensor"]
    moe, t, d = model.moe, micro_batch * config.data.sequence_length, model.hidden_size
    heads = (
        model.attention.num_attention_heads + 2 * model.attention.num_key_value_heads
    ) * model.attention.head_dim
    scores = micro_batch * model.attention.num_attention_heads / tensor * s * s * (4 + _COMPUTE)
    rows, f = volume(moe, t, sizes["expert"]), moe.moe_intermediate_size / tensor
    # A layer at work: what attention computes, and as much again of gradients; rows of the experts.
    layer = 2 * (_COMPUTE * (4 * t * d + t * heads / tensor) + scores)
    layer += rows.computed * (_ROW_D * d + _ROW_F * f) + _COMPUTE * rows.buffered * d
    layer += t * moe.n_shared_experts * _ROW_F * f
    kept = model.num_hidden_layers * _COMPUTE * t * d
    if model.remat != "full":  # `dots` keeps less than `none`; counted as `none`
        kept = model.num_hidden_layers * layer / 2
    logits = 3 * 4 * t * model.vocab_size / tensor
    # They are gone before the backward pass comes to the layers.
    return {"activations kept": kept, "a layer at work or logits": max(layer, logits)}


def _exchange(
    config: Config, micro_batch: int, sizes: dict[str, int], accumulation: int
) -> dict[str, float]:
    """Bytes that one chip receives in a step for tokens to meet experts, and tensor's sums."""
    model, s, tensor = config.model, config.data.sequence_length, sizes["tensor"]
    remat, d = model.remat == "full", model.hidden_size
    moe_layers = model.num_hidden_layers - model.first_k_dense_replace
    rows = volume(model.moe, micro_batch * s, sizes["expert"])
    vectors = _COMPUTE * accumulation * micro_batch * s * d
    # Out and back, in the forward and in the backward pass; out again where it is recomputed.
    bytes_a_row = (5 if remat else 4) * _COMPUTE * d + (3 if remat else 2) * rows.label_bytes
    return {
        "tokens": moe_layers * accumulation * rows.received * bytes_a_row,
        # Two sums a layer each way; a sum is a scatter and a gather.
        "tensor": 8 * model.num_hidden_layers * vectors * (1 - 1 / tensor),
    }


def shape(sizes: dict[str, int]) -> str:
    """A mesh in words."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one chip"


def listing(costs: dict[str, float]) -> str:
    """GB by category in words."""
    return ", ".join(f"{name} {gb:.2f}" for name, gb in costs.items())
