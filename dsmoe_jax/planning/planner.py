"""Proposes a mesh for a config on a number of chips, by arithmetic alone: nothing is compiled.

It is the mesh of least time, among those that divide the model and the batch and whose memory fits:
the longer of computation and HBM, and the network after it (`roofline`).  What is counted, and how,
is in mesh_costs.py.  `python -m dsmoe_jax aot` gives the compiler's allocation instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import jax

from dsmoe_jax.config import Config, ModelConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.mesh import AXES, across_slices
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.model import pipelined
from dsmoe_jax.parallel.mesh import BATCH_AXES
from dsmoe_jax.parallel.pipeline import Schedule
from dsmoe_jax.parallel.sharding import LOGICAL, axes_of, check, split
from dsmoe_jax.planning.mesh_costs import INSIDE, estimate, n_shards_of, n_slices
from dsmoe_jax.planning.plan import Plan as Plan
from dsmoe_jax.planning.plan import flags as flags
from dsmoe_jax.planning.plan import listing as listing
from dsmoe_jax.planning.plan import shape as shape
from dsmoe_jax.training.start import TrainState, state_shapes

USABLE = 0.9  # of the memory; the rest is for the program, its buffers, and bytes not counted here


def propose(
    config: Config, chip: str, chips: int, teacher: ModelConfig | None = None
) -> tuple[Plan, list[Plan]]:
    """The plan of least time among those that fit, and all plans considered.

    Args:
      config: to plan.
      chip: a name in `CHIPS`.
      chips: their number.
      teacher: the model of the run's teacher, see `teacher_model`; None without one.

    Raises:
      ValueError: for an unknown chip, or if no mesh fits, with the numbers of the closest one.
    """
    check_chip(chip)
    state = state_shapes(config)
    plans = _considered(config, state, chip, chips, teacher)
    if not plans:
        raise ValueError(_no_mesh(config, state, chips))
    smallest = min(plans, key=lambda plan: plan.used)
    _refuse_unless_it_fits(config, chip, smallest, "the least is", "take more chips")
    best = best_that_fits(config, plans, chip)
    assert best is not None
    return best, plans


def propose_fewest(config: Config, chip: str, teacher: ModelConfig | None = None) -> Plan:
    """The plan of `propose` on the fewest chips, a power of two, on which one fits.

    Raises:
      ValueError: for an unknown chip, or if none of the powers of two up to 65,536 fits.
    """
    check_chip(chip)
    state = state_shapes(config)
    for power in range(17):
        best = best_that_fits(config, _considered(config, state, chip, 2**power, teacher), chip)
        if best is not None:
            return best
    raise ValueError(
        f"--chip={chip}: {config.name} with its batch of {config.train.global_batch_size}"
        " (train.global_batch_size) fits no power of two of them; name a number with --chips"
    )


def _considered(
    config: Config, state: TrainState, chip: str, chips: int, teacher: ModelConfig | None
) -> list[Plan]:
    """The plans of all meshes, each with ever more micro-batches until it fits."""
    limit = USABLE * CHIPS[chip].hbm_gb
    plans = []
    for sizes in meshes(state, chips, n_slices(config)):
        if sizes["stage"] > 1:
            plans += _with_stages(config, state, sizes, teacher, limit)
            continue
        for accumulation_steps in _accumulations(config, sizes):
            plans.append(estimate(config, state, sizes, accumulation_steps, teacher))
            if plans[-1].used <= limit:
                break  # more micro-batches would only gather the weights more often
    return plans


def _with_stages(
    config: Config,
    state: TrainState,
    sizes: dict[str, int],
    teacher: ModelConfig | None,
    limit: float,
) -> list[Plan]:
    """The plans of a mesh with stages: more micro-batches are less bubble, and more memory."""
    stages = sizes["stage"]
    repeats = pipelined.repeats(config.model, stages)
    plans = []
    for n in (n for n in _accumulations(config, sizes) if n % stages == 0):
        for r in {min(repeats, default=1), max(repeats, default=1)} if repeats else ():
            # As many as fit pass together; fewer would be more bubble.
            for passing in (p for p in range(n, 0, -stages) if n % p == 0):
                schedule = Schedule(passing, r)
                plans.append(estimate(config, state, sizes, n, teacher, schedule))
                if plans[-1].used <= limit:
                    break
    return plans


def best_that_fits(config: Config, plans: list[Plan], chip: str) -> Plan | None:
    """The plan of least time, then of least memory; None if none fits."""
    fitting = [plan for plan in plans if plan.used <= USABLE * CHIPS[chip].hbm_gb]
    return min(fitting, key=lambda p: (p.bounds(config, chip).serial, p.used), default=None)


def _no_mesh(config: Config, state: TrainState, chips: int) -> str:
    can_be = []
    for axis in AXES:
        numbers, _ = possible(config, state, axis)
        can_be.append(f"{axis} {', '.join(str(n) for n in numbers if n <= chips)}")
    slices = n_slices(config)
    of_slices = f" in {slices} slices (mesh.slices), which must divide data," if slices > 1 else ""
    return (
        f"--chips={chips}: no mesh of {chips}{of_slices} divides {config.name} and its batch of"
        f" {config.train.global_batch_size} (train.global_batch_size); its axes can be"
        f" {'; '.join(can_be)}"
    )


def examine(config: Config, chip: str, chips: int, teacher: ModelConfig | None = None) -> Plan:
    """The plan with the mesh and the micro-batches of the config itself; arguments of `propose`.

    Raises:
      ValueError: for an unknown chip, a mesh that does not divide model or batch, or does not fit.
    """
    check_chip(chip)
    state = state_shapes(config)
    sizes = config.mesh.sizes(chips)
    across_slices(sizes, n_slices(config))
    pipelined.check(config, sizes["stage"])
    check(state.params, sizes)
    n_shards = n_shards_of(sizes, INSIDE)
    accumulation_steps = config.train.accumulation_steps
    require(
        config.train.global_batch_size % (n_shards * accumulation_steps) == 0,
        "train.accumulation_steps",
        accumulation_steps,
        f"times data x fsdp x expert = {n_shards} must divide train.global_batch_size="
        f"{config.train.global_batch_size}",
    )
    schedule = None
    if sizes["stage"] > 1:
        schedule = Schedule(pipelined.together(config.train), config.train.pipeline_repeats)
    plan = estimate(config, state, sizes, accumulation_steps, teacher, schedule)
    advice = "take more micro-batches (train.accumulation_steps), another mesh, or more chips"
    _refuse_unless_it_fits(config, chip, plan, "it takes", advice)
    return plan


def check_chip(chip: str) -> None:
    """Refuses a chip that is not in the table."""
    if chip not in CHIPS:
        raise ValueError(f"--chip={chip}: must be one of {', '.join(CHIPS)}")


def _refuse_unless_it_fits(config: Config, chip: str, plan: Plan, how: str, advice: str) -> None:
    chips = math.prod(plan.sizes.values())
    hbm_gb = CHIPS[chip].hbm_gb
    if plan.used > USABLE * hbm_gb:
        raise ValueError(
            f"--chips={chips}: {config.name} does not fit {chips} {chip} of {hbm_gb} GB"
            f" ({USABLE * hbm_gb:.1f} GB usable): {how} {plan.used:.1f} GB a chip"
            f" ({listing(plan.memory)}) on the mesh {shape(plan.sizes)} with"
            f" {plan.accumulation_steps} micro-batches; {advice}"
        )


def possible(config: Config, state: TrainState, axis: str) -> tuple[list[int], list[str]]:
    """The sizes of a mesh axis that is the only one above 1, and the lengths that they divide."""
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


def meshes(state: TrainState, chips: int, slices: int = 1) -> Iterator[dict[str, int]]:
    """All meshes of this many chips that divide the arrays of a state, and that slices divide."""
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    for stage, fsdp, expert, tensor in itertools.product(divisors, repeat=4):
        if chips % (stage * fsdp * expert * tensor):
            continue
        data = chips // (stage * fsdp * expert * tensor)
        sizes = {"stage": stage, "data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
        try:
            check(state.params, sizes)
            across_slices(sizes, slices)
        except ValueError:
            continue
        yield sizes


def _accumulations(config: Config, sizes: dict[str, int]) -> list[int]:
    """Numbers of micro-batches into which the batch can be split, fewest first."""
    sequences, rest = divmod(config.train.global_batch_size, n_shards_of(sizes, INSIDE))
    if rest:
        return []
    return [n for n in range(1, sequences + 1) if sequences % n == 0]
