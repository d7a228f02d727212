"""A plan in words: the mesh, its costs, and the costs of other meshes."""

from __future__ import annotations

import math

from dsmoe_jax.config import Config
from dsmoe_jax.config.mesh import ACROSS_SLICES, AXES
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.model import size
from dsmoe_jax.planning import planner
from dsmoe_jax.planning.roofline import Roofline
from dsmoe_jax.training.start import state_shapes


def stage_to_plan(config: Config) -> tuple[Config, str]:
    """The stage of a run whose steps have the most FLOPs, and a line that says so.

    A mesh stays for the whole run; the line is "" for a run that is one stage.
    """
    stage = size.most_work(config)
    if config.train.stages is None:
        return stage.config, ""
    steps = f"{stage.first + 1} to {stage.end}"
    return stage.config, f"stage     steps {steps}, which have the most FLOPs a step\n"


def describe(config: Config, plan: planner.Plan, plans: list[planner.Plan], chip: str) -> str:
    """The plan in a few lines: flags, memory, traffic, and the best mesh without each axis."""
    chips = math.prod(plan.sizes.values())
    hbm_gb = CHIPS[chip].hbm_gb
    limit = planner.USABLE * hbm_gb
    lines = [
        f"{config.name} on {chips} {chip}: {planner.shape(plan.sizes)},"
        f" micro-batches {plan.accumulation_steps}",
        f"flags    {' '.join(planner.flags(plan))}",
        f"memory   {plan.used:.1f} of {hbm_gb} GB a chip: {planner.listing(plan.memory)}",
        f"traffic  {plan.moved:.1f} GB a chip and step: {planner.listing(plan.traffic) or 'none'}",
        *_between_slices(plan),
        f"HBM      {sum(plan.hbm.values()):.0f} GB a chip and step: {planner.listing(plan.hbm)}",
        f"at least {_seconds(plan.bounds(config, chip))}",
    ]
    if not plans:
        return "\n".join([*lines, "why      it is the mesh of the config"])
    lines.append(f"why      it takes the least time of the meshes that take at most {limit:.1f} GB")
    lines += [f"         {_instead(config, axis, plan, plans, chip)}" for axis in AXES]
    return "\n".join(lines)


def _between_slices(plan: planner.Plan) -> list[str]:
    if plan.slices == 1:
        return []
    gb = sum(plan.sliced.values())
    return [f"         and {gb:.2f} GB from the other slices of {plan.slices}, once a step"]


def _seconds(bounds: Roofline) -> str:
    return (
        f"{bounds.serial:.3g} s a step: compute {bounds.compute:.3g}, or HBM {bounds.memory:.3g} if"
        f" longer, then network {bounds.network:.3g}"
    )


def _instead(
    config: Config, axis: str, plan: planner.Plan, plans: list[planner.Plan], chip: str
) -> str:
    """The cost of the best mesh without an axis that the plan uses, or with one it does not."""
    change = f"without {axis}" if plan.sizes[axis] > 1 else f"with {axis}"
    others = [p for p in plans if (p.sizes[axis] > 1) != (plan.sizes[axis] > 1)]
    if not others and plan.slices > 1 and axis in ACROSS_SLICES:
        return f"{change}: no such mesh; it goes from slice to slice"
    if not others:
        sizes, divided = planner.possible(config, state_shapes(config), axis)
        can_be = ", ".join(map(str, sizes))
        return f"{change}: no such mesh; it must divide {', '.join(divided)}, so can be {can_be}"
    best = planner.best_that_fits(config, others, chip)
    if best is None:
        least = min(others, key=lambda p: p.used)
        return f"{change}: does not fit, at least {least.used:.1f} GB a chip"
    seconds = best.bounds(config, chip).serial
    return (
        f"{change}: {seconds:.3g} s, {best.moved:.1f} GB of traffic ({planner.shape(best.sizes)})"
    )
