"""Proposes a mesh for a config on so many chips, by arithmetic alone: nothing is compiled.

Among all meshes that divide the model and the batch and whose memory fits, the one that moves the
fewest bytes.  What is counted:

- state, exact: float32 parameters, two moments and gradients, split as sharding.py does;
- weights in use: what FSDP gathers for a layer, twice (the next one arrives meanwhile), and the
  embedding and the head;
- activations, an estimate: what rematerialisation keeps of every layer, one layer at work, logits;
- traffic of one step, for each chip: gathered weights and scattered gradients, the exchange of
  tokens between experts, the sums of `tensor`.

`python -m dsmoe_jax.aot` replaces the estimate by what the compiler allocates.

Shapes: T tokens of a micro-batch on one chip, L layers, D hidden, K activated experts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax

from dsmoe_jax.config import Config
from dsmoe_jax.parallel.chips import CHIPS
from dsmoe_jax.parallel.mesh import AXES, BATCH_AXES
from dsmoe_jax.parallel.sharding import axes_of, check, split
from dsmoe_jax.training.step import TrainState, state_shapes

HBM_GB = {name: chip.hbm_gb for name, chip in CHIPS.items()}
USABLE = 0.9  # the rest is for the program, its buffers, and what the estimate misses
IMBALANCE = 2.0  # rows of the busiest device relative to the mean (MaxVio 1)
_COMPUTE = 2  # bytes: activations and gathered weights are bfloat16
_STATE = 16  # bytes of a parameter, its moments and its gradient


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
    if chip not in HBM_GB:
        raise ValueError(f"--chip={chip}: must be one of {', '.join(HBM_GB)}")
    state, limit, plans = state_shapes(config), USABLE * HBM_GB[chip], []
    for sizes in meshes(state, chips):
        for accumulation in _accumulations(config, sizes):
            plans.append(estimate(config, state, sizes, accumulation))
            if plans[-1].used <= limit:
                break  # more micro-batches would only gather the weights more often
    if not plans:
        raise ValueError(
            f"--chips={chips}: no mesh of {chips} divides {config.name} and its batch of"
            f" {config.train.global_batch_size} (train.global_batch_size)"
        )
    smallest = min(plans, key=lambda plan: plan.used)
    if smallest.used > limit:
        raise ValueError(
            f"--chips={chips}: {config.name} does not fit {chips} {chip} of {HBM_GB[chip]} GB"
            f" ({limit:.1f} GB usable): the least is {smallest.used:.1f} GB a chip"
            f" ({_listing(smallest.memory)}) on the mesh {_shape(smallest.sizes)}; take more chips"
        )
    return min((p for p in plans if p.used <= limit), key=lambda p: (p.moved, p.used)), plans


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
        "gradients": 4 * local,
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
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    scores = micro_batch * model.num_attention_heads / tensor * s * s * (4 + _COMPUTE)
    rows = t * moe.num_experts_per_tok * (IMBALANCE if sizes["expert"] > 1 else 1.0)
    widths = 3 * moe.moe_intermediate_size / tensor
    experts = rows * (2 * d + widths) + t * moe.n_shared_experts * widths
    # A layer at work: what it computes, and as much again of gradients.
    layer = _COMPUTE * (4 * t * d + t * heads / tensor + experts) + scores
    kept = model.num_hidden_layers * _COMPUTE * t * d
    if model.remat != "full":  # `dots` keeps less than `none`; counted as `none`
        kept = model.num_hidden_layers * layer
    return {
        "activations kept": kept,
        "a layer at work": 2 * layer,
        "logits": 3 * 4 * t * model.vocab_size / tensor,
    }


def _exchange(
    config: Config, micro_batch: int, sizes: dict[str, int], accumulation: int
) -> dict[str, float]:
    """Bytes that one chip receives in a step for tokens to meet experts, and tensor's sums."""
    model, expert, tensor = config.model, sizes["expert"], sizes["tensor"]
    vectors = (
        _COMPUTE * accumulation * micro_batch * config.data.sequence_length * model.hidden_size
    )
    moe_layers = model.num_hidden_layers - model.first_k_dense_replace
    k = model.moe.num_experts_per_tok
    return {
        # Out and back, in the forward and in the backward pass; again where it is recomputed.
        "tokens": (6 if model.remat == "full" else 4) * moe_layers * k * vectors * (1 - 1 / expert),
        # Two sums a layer each way; a sum is a scatter and a gather.
        "tensor": 8 * model.num_hidden_layers * vectors * (1 - 1 / tensor),
    }


def describe(config: Config, plan: Plan, plans: list[Plan], chip: str) -> str:
    """The plan in a few lines: flags, memory, traffic, and what each axis is good for."""
    flags = [f"--config.mesh.{axis}={size}" for axis, size in plan.sizes.items()]
    flags.append(f"--config.train.accumulation_steps={plan.accumulation_steps}")
    chips, limit = math.prod(plan.sizes.values()), USABLE * HBM_GB[chip]
    lines = [
        f"{config.name} on {chips} {chip}: {_shape(plan.sizes)},"
        f" micro-batches {plan.accumulation_steps}",
        f"flags    {' '.join(flags)}",
        f"memory   {plan.used:.1f} of {HBM_GB[chip]} GB a chip: {_listing(plan.memory)}",
        f"traffic  {plan.moved:.1f} GB a chip and step: {_listing(plan.traffic) or 'none'}",
        f"why      it moves the fewest bytes of the meshes that take at most {limit:.1f} GB",
    ]
    for axis in AXES:
        others = [p for p in plans if (p.sizes[axis] > 1) != (plan.sizes[axis] > 1)]
        lines.append(f"         {_instead(axis, plan, others, limit)}")
    return "\n".join(lines)


def _instead(axis: str, plan: Plan, others: list[Plan], limit: float) -> str:
    """What the best mesh would cost that uses an axis which the plan does not, or the reverse."""
    change = f"without {axis}" if plan.sizes[axis] > 1 else f"with {axis}"
    if not others:
        return f"{change}: nothing divides the model and the batch"
    fitting = [p for p in others if p.used <= limit]
    if not fitting:
        least = min(others, key=lambda p: p.used)
        return f"{change}: does not fit, at least {least.used:.1f} GB a chip"
    best = min(fitting, key=lambda p: (p.moved, p.used))
    return f"{change}: {best.moved:.1f} GB of traffic ({_shape(best.sizes)})"


def _shape(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one chip"


def _listing(costs: dict[str, float]) -> str:
    return ", ".join(f"{name} {gb:.2f}" for name, gb in costs.items())
