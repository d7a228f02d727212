"""Verdicts on claims, as far as the spread over seeds allows."""

from __future__ import annotations

import dataclasses

import numpy as np

from dsmoe_jax.study import spread
from dsmoe_jax.study.claims import LOSS, Claim
from dsmoe_jax.study.experiment import ProbeArm
from dsmoe_jax.study.results import Comparison

HOLDS, REVERSED, UNDECIDED, MISSING = "holds", "reversed", "not decided", "missing"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim with its values in the paper and here, and the verdict.

    Attributes:
      claim: whose left side is `constant + sum(weight * mean of the measure)`.
      paper: its left side from the source's own numbers; None where it prints none.
      ours: its left side here, mean over the seeds that all finished arms share; None if there
        are none.
      half_width: of the 95 % interval of `ours`; None with a single seed or a single pair of runs.
      verdict: HOLDS, REVERSED, UNDECIDED (the interval contains 0, or the value is 0) or MISSING.
        Without an interval only the sign decides.
      p: two-sided, of a true value of 0; None without an interval.
    """

    claim: Claim
    paper: float | None
    ours: float | None
    half_width: float | None
    verdict: str
    p: float | None = None


def judge(comparison: Comparison) -> list[Finding]:
    """Judges every claim about arms that were chosen."""
    labels = {arm.label for arm in comparison.arms}
    claims = comparison.experiment.all_claims()
    return [_judge(comparison, claim) for claim in claims if claim.weights.keys() <= labels]


def _judge(comparison: Comparison, claim: Claim) -> Finding:
    values = comparison.by_seed(claim.measure)
    seeds = spread.common_seeds(values)
    paper = _paper_value(comparison, claim)
    if not seeds or not claim.weights.keys() <= values.keys():
        return Finding(claim, paper, None, None, MISSING)
    by_seed = [_left_side(claim, {label: values[label][s] for label in values}) for s in seeds]
    ours = float(np.mean(by_seed))
    if claim.is_ordering and not _is_about_probes(comparison, claim):
        half_width = spread.difference_half_width(values)
        degrees = spread.difference_degrees(values)
    else:
        # Seed by seed: the seed's effect may not cancel, and probes of one model share its noise.
        half_width = spread.mean_half_width(by_seed)
        degrees = len(by_seed) - 1
    p = None if half_width is None else spread.p_value(ours, half_width, degrees)
    return Finding(claim, paper, ours, half_width, _verdict(ours, half_width or 0.0), p)


def _left_side(claim: Claim, values: dict[str, float]) -> float:
    return claim.constant + sum(weight * values[label] for label, weight in claim.weights.items())


def _is_about_probes(comparison: Comparison, claim: Claim) -> bool:
    return any(isinstance(arm, ProbeArm) for arm in comparison.arms if arm.label in claim.weights)


def _paper_value(comparison: Comparison, claim: Claim) -> float | None:
    """The left side as the claim states it, or from the losses that the paper prints."""
    losses = {arm.label: arm.paper_loss for arm in comparison.arms}
    known = {label: loss for label, loss in losses.items() if loss is not None}
    if claim.paper is not None or claim.measure != LOSS or not claim.weights.keys() <= known.keys():
        return claim.paper
    return _left_side(claim, known)


def _verdict(value: float, half_width: float) -> str:
    if abs(value) <= half_width:
        return UNDECIDED
    return HOLDS if value > 0 else REVERSED
