"""Plans of an experiment for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.planning import planner
from dsmoe_jax.report.blocks import Table
from dsmoe_jax.report.numbers import short
from dsmoe_jax.study.cells import Options, chosen
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from dsmoe_jax.study.plans import Hardware, PlannedArm

_HEAD = (
    "",
    "parameters",
    "activated",
    "tokens",
    "FLOPs",
    "chips",
    "chip-hours",
    "hours",
    "micro-batches",
    "mesh",
)


def table(planned: Sequence[PlannedArm]) -> Table:
    """One row an arm; costs of one seed."""
    return Table(_HEAD, [_row(arm) for arm in planned])


def _row(arm: PlannedArm) -> list[str]:
    return [
        arm.label,
        short(arm.parameters),
        short(arm.activated),
        short(arm.tokens),
        f"{arm.flops:.3g}",
        f"{arm.chips}",
        _hours(arm.chip_hours),
        _hours(arm.chip_hours / arm.chips),
        f"{arm.plan.accumulation_steps}",
        planner.shape(arm.plan.sizes),
    ]


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def notes(
    experiment: Experiment, options: Options, hardware: Hardware, planned: Sequence[PlannedArm]
) -> list[str]:
    """Lines below the table: meaning of the numbers, cost of all seeds, command of each arm."""
    seeds = experiment.seeds[options.scale] if options.seeds is None else options.seeds
    peak = CHIPS[hardware.chip].peak_flops / 1e12
    hours = _hours(seeds * sum(arm.chip_hours for arm in planned))
    plural = "" if seeds == 1 else "s"
    lines = [
        f"One seed each; all arms with {seeds} seed{plural}: {hours} chip-hours.  FLOPs: training,"
        f" at the widths really used.  Hours: at {100 * hardware.utilisation:g} % of the"
        f" {peak:g} TFLOP/s of {hardware.chip}."
    ]
    runs = seeds * len(chosen(experiment, options.arms))
    lines.append(f"A job array trains them one a task, --cell=0 to --cell={runs - 1}.")
    measured = {a.experiment.module: None for a in experiment.arms if isinstance(a, ProbeArm)}
    if measured:
        modules = " and ".join(measured)
        lines.append(f"{experiment.name} trains nothing: it measures these models of {modules}.")
    if any(arm.config.data.corpus is None for arm in planned):
        lines.append("CORPUS stands for a text of one's own, see docs/data.md.")
    needed = dict.fromkeys(module for arm in planned for module in arm.needs)
    if needed:
        modules = " and ".join(needed)
        lines.append(f"Finished runs of {modules} are needed first, which these numbers leave out.")
    return lines + [
        "\n  ".join([f"{arm.label}:", *arm.preparation, arm.command]) for arm in planned
    ]
