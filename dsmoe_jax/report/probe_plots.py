"""Pictures of probes: a measure of trained models over the strength of an intervention."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from dsmoe_jax.report.style import axes, colour, label_ends, marker
from dsmoe_jax.study.experiment import AnyArm, ProbeArm
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison


def over_x(comparison: Comparison) -> Figure | None:
    """The main measure over `x`: a line a trained model, a level line for an arm without `x`."""
    experiment = comparison.experiment
    values = comparison.by_seed(experiment.main_measure)
    lines: dict[str, list[ProbeArm]] = {}
    level: list[AnyArm] = []
    for arm in comparison.arms:
        if arm.label not in values:
            continue
        if isinstance(arm, ProbeArm) and arm.x is not None:
            lines.setdefault(arm.trained, []).append(arm)
        else:
            level.append(arm)
    if not lines:
        return None
    means = {label: float(np.mean(list(seeds.values()))) for label, seeds in values.items()}
    figure, ax = axes(right=0.75)
    for arms in lines.values():
        _line(comparison, ax, arms, means)
    ends: dict[AnyArm, float] = {}
    names: dict[AnyArm, str] = {}
    for trained, arms in lines.items():
        last = max(arms, key=lambda arm: arm.x or 0.0)
        ends[last] = means[last.label]
        names[last] = trained
    for arm in level:
        ax.axhline(means[arm.label], color=colour(comparison, arm), lw=1.1)
        ends[arm] = means[arm.label]
    ax.set_xlabel(experiment.x_axis)
    ax.set_ylabel(MEASURES[experiment.main_measure].label)
    label_ends(comparison, ax, ends, names)
    return figure


def _line(comparison: Comparison, ax, arms: list[ProbeArm], means: dict[str, float]) -> None:
    arms = sorted(arms, key=lambda arm: arm.x or 0.0)
    last = arms[-1]
    ax.plot(
        [arm.x for arm in arms],
        [means[arm.label] for arm in arms],
        marker(comparison, last) + "-",
        ms=4,
        color=colour(comparison, last),
    )
