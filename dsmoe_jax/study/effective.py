"""Differences of losses as compute: how much more training the baseline would need.

An arm's effective compute is the compute at which the law of the baseline, fitted to its own sizes,
reaches the arm's loss, over the compute of the baseline's reference model.  The law is shifted so
that the reference model itself counts as 1: what the law leaves over there is no difference of
arms.  The leverage of an arm is the same over its own compute (arXiv 2507.17702 counts so, with a
dense baseline).

Shapes: P baseline models, A arms, S seeds, R resamples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsmoe_jax.study import baselines, laws, spread
from dsmoe_jax.study.baselines import BaselineRuns, NoBaseline
from dsmoe_jax.study.claims import LOSS
from dsmoe_jax.study.laws import Estimate, Fit
from dsmoe_jax.study.resampling import Interval, interval, resampled_means
from dsmoe_jax.study.results import Comparison
from dsmoe_jax.study.spread import BySeed, table_of


@dataclasses.dataclass(frozen=True)
class ArmCompute:
    """Effective compute of an arm, in units of the baseline's reference model.

    Attributes:
      label: of the arm.
      loss: mean over the seeds that all arms and baseline models have.
      own: compute of the arm itself.
      times: effective compute; inf where the baseline's law never reaches the loss.
      interval: of `times`; None with fewer than two seeds.
      beyond: how many times the effective compute lies outside the baseline's sizes; 1 inside.
      times_R: `times` in each resample; () with fewer than two seeds.
    """

    label: str
    loss: float
    own: float
    times: float
    interval: Interval | None
    beyond: float
    times_R: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Counted:
    """Arms counted in the compute of a baseline.

    Attributes:
      law: of the baseline.
      runs: of the baseline.
      seeds: that all arms and baseline models have.
      arms: in the order of the experiment.
    """

    law: Estimate
    runs: BaselineRuns
    seeds: tuple[int, ...]
    arms: tuple[ArmCompute, ...]


def count(comparison: Comparison, results: Path) -> Counted:
    """Effective compute of every finished arm of an experiment with a baseline.

    Args:
      comparison: whose arms are trained, not probes.
      results: see `baselines.find`.

    Raises:
      NoBaseline: if there are no results of the baseline that compare.
    """
    runs = baselines.find(comparison, results)
    own = {}
    for arm in comparison.arms:
        for row in comparison.finished(arm):
            config = arm.run_config(comparison.scale, row.seed, comparison.overrides)
            own[arm.label] = (baselines.compute_of(row, config) or 0.0) / runs.reference
    return count_in(runs, comparison.by_seed(LOSS), own)


def count_in(runs: BaselineRuns, losses: BySeed, own: Mapping[str, float]) -> Counted:
    """Effective compute of losses in the compute of a baseline.

    Args:
      runs: of the baseline.
      losses: label -> seed -> loss, of the arms.
      own: label -> compute of the arm, in units of the reference.

    Raises:
      NoBaseline: if no seed is finished in all of them, or the baseline has no law of compute.
    """
    if not losses:
        raise NoBaseline("No arm is finished yet.")
    seeds = spread.common_seeds({**{f"baseline {k}": v for k, v in runs.losses.items()}, **losses})
    if not seeds:
        raise NoBaseline(f"No seed is finished in all arms and in all models of `{runs.path}`.")
    baseline_SP = table_of(runs.losses, runs.labels, seeds)
    arms_SA = table_of(losses, list(losses), seeds)
    try:
        law = laws.compute_law(runs.compute_P, baseline_SP)
        mean_A = arms_SA.mean(axis=0)
        times_A = _times(law.fit, mean_A, baseline_SP.mean(axis=0), runs)
    except ValueError as error:
        raise NoBaseline(f"`{runs.path}` gives no law: {error}.") from error
    times_RA = _resampled(law, arms_SA, baseline_SP, runs)
    return Counted(
        law,
        runs,
        tuple(seeds),
        tuple(
            ArmCompute(
                label,
                float(mean_A[i]),
                own[label],
                times_A[i],
                None if times_RA is None else interval(times_RA[:, i]),
                laws.reach(law.fit, "C", times_A[i] * runs.reference),
                () if times_RA is None else tuple(times_RA[:, i].tolist()),
            )
            for i, label in enumerate(losses)
        ),
    )


def _times(fit: Fit, loss_A: np.ndarray, baseline_P: np.ndarray, runs: BaselineRuns) -> list[float]:
    """Effective compute of each arm; inf where the law never gets there."""
    at = int(np.argmin(np.abs(np.log(runs.compute_P / runs.reference))))
    shift = float(fit.predict(C=runs.reference)) - float(baseline_P[at])
    return [laws.effective_compute(fit, loss + shift, runs.reference) for loss in loss_A]


def _resampled(
    law: Estimate, arms_SA: np.ndarray, baseline_SP: np.ndarray, runs: BaselineRuns
) -> np.ndarray | None:
    """Effective compute in each resample, (R, A); None with fewer than two seeds."""
    losses_RA = resampled_means(arms_SA)
    baseline_RP = resampled_means(baseline_SP)
    if losses_RA is None or baseline_RP is None:
        return None
    times_RA = np.full(losses_RA.shape, np.inf)  # also where the law does not fall with compute
    for r, fit in enumerate(law.resampled):
        if fit.constants["A"]:
            times_RA[r] = _times(fit, losses_RA[r], baseline_RP[r], runs)
    return times_RA
