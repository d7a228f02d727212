"""Which of the paper's orderings hold here, as far as the spread over seeds lets one say.

Runs of one seed see the same data in the same order, so part of the spread is common to all arms.
The model is loss = arm + seed + noise: the noise is what is left after every arm's and every
seed's mean, with (A - 1)(S - 1) degrees of freedom for A arms and S seeds.  A difference of two
arms is known to +- t * noise * sqrt(2 / S) (95 %, Student's t, each pair by itself).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from dsmoe_jax.study.results import Comparison
from dsmoe_jax.study.spec import Arm

HOLDS, REVERSED, UNDECIDED, MISSING = "holds", "reversed", "not decided", "missing"
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Ordering:
    """One claim of the paper, "`worse` has a higher loss than `better`", and what was found.

    Attributes:
      paper: the paper's difference in nats per token; None where it prints no losses.
      ours: mean difference over the seeds that all finished arms share; None if there are none.
      half_width: of its 95 % interval; None with a single seed or a single pair of runs.
      verdict: HOLDS, REVERSED, UNDECIDED (the interval contains 0, or the difference is 0) or
        MISSING.  Without an interval it is only the sign of the difference that is judged.
    """

    worse: Arm
    better: Arm
    paper: float | None
    ours: float | None
    half_width: float | None
    verdict: str


def mean_and_spread(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values for it."""
    if not values:
        return None, None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), spread


def losses_by_seed(comparison: Comparison) -> dict[str, dict[int, float]]:
    """Validation losses of the finished runs: label -> seed -> nats per token."""
    found = {
        arm.label: {row.seed: row.validation_loss for row in comparison.of_arm(arm)}
        for arm in comparison.arms
    }
    return {label: losses for label, losses in found.items() if losses}  # pyright: ignore


def common_seeds(losses: Mapping[str, Mapping[int, float]]) -> list[int]:
    """Seeds that every arm with results has."""
    return sorted(set.intersection(*map(set, losses.values()))) if losses else []


def difference_half_width(losses: Mapping[str, Mapping[int, float]]) -> float | None:
    """Half the 95 % interval of a difference of two arms; None if it cannot be known."""
    seeds = common_seeds(losses)
    if len(losses) < 2 or len(seeds) < 2:
        return None
    degrees = (len(losses) - 1) * (len(seeds) - 1)
    table = np.array([[by_seed[seed] for seed in seeds] for by_seed in losses.values()])
    noise = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    variance = float((noise**2).sum()) / degrees
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))
    return quantile * math.sqrt(2 * variance / len(seeds))


def compare(comparison: Comparison) -> list[Ordering]:
    """Judges every pair of arms that the paper puts in an order."""
    losses = losses_by_seed(comparison)
    seeds, half_width = common_seeds(losses), difference_half_width(losses)
    labels = {arm.label for arm in comparison.arms}
    found = []
    for worse, better in comparison.experiment.orderings():
        if not {worse.label, better.label} <= labels:
            continue
        paper = None
        if worse.paper_loss is not None and better.paper_loss is not None:
            paper = worse.paper_loss - better.paper_loss
        if not seeds or not {worse.label, better.label} <= set(losses):
            found.append(Ordering(worse, better, paper, None, None, MISSING))
            continue
        ours = float(np.mean([losses[worse.label][s] - losses[better.label][s] for s in seeds]))
        found.append(
            Ordering(worse, better, paper, ours, half_width, _verdict(ours, half_width or 0.0))
        )
    return found


def _verdict(difference: float, half_width: float) -> str:
    if abs(difference) <= half_width:
        return UNDECIDED
    return HOLDS if difference > 0 else REVERSED
