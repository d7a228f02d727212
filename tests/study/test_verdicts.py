"""Verdicts on claims, for numbers chosen by hand."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.report import numbers
from dsmoe_jax.study.claims import below, bounded, decreasing, larger_change, ratio_below
from dsmoe_jax.study.experiment import Arm, Experiment, ProbeArm
from dsmoe_jax.study.results import Comparison, Row
from dsmoe_jax.study.verdicts import HOLDS, MISSING, REVERSED, UNDECIDED, judge

ARMS = (Arm("A", "dense_2b", paper_loss=2.0), Arm("B", "hash_2b", paper_loss=1.9))
C = Arm("C", "dsmoe_2b", paper_loss=1.9)
UNKNOWN = tuple(dataclasses.replace(arm, paper_loss=None) for arm in (*ARMS, C))


def comparison(losses, arms=(*ARMS, C), claims=(), measure="validation_loss") -> Comparison:
    experiment = Experiment("experiments.test", "", "", "", arms=arms, claims=claims)
    rows = tuple(
        Row(label, seed, "", "", {measure: value, "tokens": None if value is None else 1})
        for label, values in losses.items()
        for seed, value in enumerate(values)
    )
    return Comparison(experiment, "smoke", arms, rows, {}, "")


def verdicts(**losses) -> dict[str, str]:
    return {finding.claim.text: finding.verdict for finding in judge(comparison(losses))}


def judged(claim, losses, arms=UNKNOWN, measure="validation_loss"):
    (finding,) = judge(comparison(losses, arms, (claim,), measure))
    return finding


def test_equal_losses_in_the_paper_are_no_ordering():
    assert set(verdicts(A=[3.0], B=[2.9], C=[2.8])) == {"B below A", "C below A"}


def test_orderings_without_losses_are_written_out():
    losses = {"A": [1.0], "B": [2.0], "C": [3.0]}
    found = judge(comparison(losses, UNKNOWN, decreasing("C", "A")))
    assert [(f.claim.text, f.paper, f.verdict) for f in found] == [("A below C", None, HOLDS)]


def test_an_ordering_that_is_written_out_is_not_repeated_and_keeps_the_papers_difference():
    losses = {"A": [3.0], "B": [2.9], "C": [3.1]}
    found = judge(comparison(losses, claims=decreasing("A", "B", "C")))
    assert [f.claim.text for f in found] == ["B below A", "C below A", "C below B"]
    assert found[0].paper == pytest.approx(0.1)


def test_clear_differences_hold_or_are_reversed():
    assert verdicts(A=[3.0, 3.01], B=[2.9, 2.91], C=[3.5, 3.51]) == {
        "B below A": HOLDS,
        "C below A": REVERSED,
    }


def test_what_all_seeds_share_is_not_noise():
    """Seed 1 is worse for all by the same amount: that says nothing about the arms."""
    found = verdicts(A=[3.0, 4.0], B=[2.9, 3.9], C=[2.8, 3.8])
    assert found == {"B below A": HOLDS, "C below A": HOLDS}


def test_differences_within_the_noise_are_not_decided():
    found = verdicts(A=[3.0, 3.1], B=[3.05, 2.95], C=[2.0, 2.1])
    assert found == {"B below A": UNDECIDED, "C below A": HOLDS}


def test_a_single_seed_gives_a_sign_and_no_interval():
    found = judge(comparison({"A": [3.0], "B": [2.9], "C": [3.1]}))
    assert [finding.verdict for finding in found] == [HOLDS, REVERSED]
    assert [finding.half_width for finding in found] == [None, None]


def test_a_missing_arm_is_missing_and_others_are_judged():
    found = verdicts(A=[3.0, 3.01], B=[2.9, 2.91], C=[None, None])
    assert found == {"B below A": HOLDS, "C below A": MISSING}


def test_only_seeds_that_all_arms_have_count():
    found = judge(comparison({"A": [3.0, 9.0], "B": [2.9, None], "C": [2.8, None]}))
    assert found[0].ours == pytest.approx(0.1)
    assert found[0].half_width is None


def test_two_arms_give_the_interval_of_the_paired_t_test():
    a, b = np.array([3.0, 3.2, 3.1]), np.array([2.9, 2.95, 3.05])
    (found,) = judge(comparison({"A": list(a), "B": list(b)}, arms=ARMS))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2)


def test_claims_about_arms_that_were_not_chosen_are_left_out():
    some = dataclasses.replace(comparison({"A": [3.0], "B": [2.9]}), arms=ARMS)
    assert [finding.claim.text for finding in judge(some)] == ["B below A"]


def test_a_difference_of_differences_has_the_interval_of_a_t_test_seed_by_seed():
    a, b, c = np.array([3.0, 3.1, 3.3]), np.array([4.0, 4.2, 4.2]), np.array([3.2, 3.35, 3.4])
    claim = larger_change("from A to B more than from C to A", ("A", "B"), ("C", "A"))
    found = judged(claim, {"A": list(a), "B": list(b), "C": list(c)})
    by_seed = (b - a) - (a - c)
    interval = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert found.ours == pytest.approx(by_seed.mean())
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2)
    assert found.verdict == HOLDS


@pytest.mark.parametrize(
    ("claim", "ours", "verdict"),
    [
        (ratio_below("B", "A", 0.8), 0.8 * 3.0 - 2.0, HOLDS),
        (ratio_below("B", "A", 0.5), 0.5 * 3.0 - 2.0, REVERSED),
        (bounded("A", below=3.5), 0.5, HOLDS),
        (bounded("A", above=3.5), -0.5, REVERSED),
        (bounded("A", below=3.001), 0.001, UNDECIDED),
    ],
)
def test_ratios_and_bounds(claim, ours, verdict):
    found = judged(claim, {"A": [2.99, 3.01], "B": [1.99, 2.01]})
    assert found.ours == pytest.approx(ours)
    assert found.verdict == verdict


def test_a_claim_may_be_about_any_measure():
    claim = below("B", "A", measure="maxvio")
    assert judged(claim, {"A": [2.0], "B": [0.1]}, measure="maxvio").verdict == HOLDS
    assert judged(claim, {"A": [2.0], "B": [0.1]}).verdict == MISSING


def test_the_value_of_the_paper_follows_from_its_losses():
    claim = ratio_below("B", "A", 0.96)
    found = judge(comparison({"A": [3.0], "B": [2.0]}, ARMS, (claim,)))[1]
    assert found.paper == pytest.approx(0.96 * 2.0 - 1.9)


def test_probes_of_one_model_are_judged_seed_by_seed():
    """Their noise is not independent of each other, nor of one size."""
    trained = Experiment("experiments.trained", "", "", "", (Arm("A", "dsmoe_2b"),))
    arms = tuple(
        ProbeArm(label, trained, "A", Intervention(mask_best=i)) for i, label in enumerate("ABC")
    )
    losses = {"A": [3.0, 3.1, 3.2], "B": [3.1, 3.2, 3.31], "C": [3.0, 9.0, 5.0]}
    found = judged(below("A", "B"), losses, arms)
    interval = stats.ttest_rel(losses["B"], losses["A"]).confidence_interval(0.95)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2)
    assert found.verdict == HOLDS


def test_claims_without_sense_are_refused_when_built():
    with pytest.raises(ValueError, match=r"test: arm 'D': must be one of \['A', 'B', 'C'\]"):
        comparison({}, claims=(below("D", "A"),))
    with pytest.raises(ValueError, match=r"test: measure 'los': must be one of validation_loss"):
        comparison({}, claims=(below("B", "A", measure="los"),))
    with pytest.raises(ValueError, match=r"above=None, below=None: give one of the two"):
        bounded("A")


# How often verdicts are right, where the truth is known: many made-up comparisons of five arms and
# three seeds whose values are arm + seed + noise.  With fixed random numbers the test gives the
# same counts every time.  A share p of N comparisons has a standard deviation of
# sqrt(p (1 - p) / N), 0.7 % here; four of them are allowed, which a correct interval exceeds once
# in 16,000 draws.  The quantile of the normal distribution in place of Student's covers 91 % of
# the orderings and 81 % of the others, far outside.
N = 1000
FIVE_PERCENT = pytest.approx(0.05, abs=4 * (0.05 * 0.95 / N) ** 0.5)
MEANS = {"A": 3.0, "B": 2.9, "C": 2.9, "D": 3.03, "E": 2.7}
MADE_UP = tuple(Arm(label, "dsmoe_2b") for label in MEANS)
TRUTHS = (
    # (claim, its left side for the true means)
    (below("B", "A"), 0.1),
    (below("C", "B"), 0.0),
    (ratio_below("E", "A", 0.92), 0.06),
    (ratio_below("E", "A", 0.9), 0.0),
    (larger_change("from E to A more than from B to D", ("E", "A"), ("B", "D")), 0.17),
    (larger_change("from B to A more than from C to A", ("B", "A"), ("C", "A")), 0.0),
)


@pytest.fixture(scope="module")
def simulated():
    """Findings of every claim of `TRUTHS` in N made-up comparisons; list by claim."""
    rng = np.random.default_rng(0)
    claims = tuple(claim for claim, _ in TRUTHS)
    found = []
    for _ in range(N):
        seeds = rng.normal(0, 0.2, 3)
        losses = {
            label: list(mean + seeds + rng.normal(0, 0.05, 3)) for label, mean in MEANS.items()
        }
        found.append(judge(comparison(losses, MADE_UP, claims)))
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("i", range(len(TRUTHS)))
def test_intervals_cover_the_truth_as_often_as_they_say(simulated, i):
    claim, truth = TRUTHS[i]
    assert sum(claim.weights[label] * MEANS[label] for label in claim.weights) == (
        pytest.approx(truth)
    )
    missed = sum(abs(f.ours - truth) > f.half_width for f in simulated[i]) / N
    assert missed == FIVE_PERCENT


@pytest.mark.parametrize("i", [i for i, (_, truth) in enumerate(TRUTHS) if truth == 0])
def test_without_an_effect_one_in_twenty_claims_looks_decided(simulated, i):
    verdicts = [found.verdict for found in simulated[i]]
    assert (verdicts.count(HOLDS) + verdicts.count(REVERSED)) / N == FIVE_PERCENT


@pytest.mark.parametrize("i", [i for i, (_, truth) in enumerate(TRUTHS) if truth > 0])
def test_a_true_claim_is_hardly_ever_reversed(simulated, i):
    verdicts = [found.verdict for found in simulated[i]]
    assert verdicts.count(REVERSED) / N < 0.01
    assert verdicts.count(HOLDS) > 5 * verdicts.count(REVERSED)


def test_p_is_that_of_a_t_test():
    """Two arms and S seeds: the paired t-test of scipy."""
    a = [3.00, 3.10, 3.07, 2.95]
    b = [2.90, 3.02, 3.01, 2.93]
    found = judged(below("B", "A"), {"A": a, "B": b})
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    bound = judged(bounded("A", above=2.98), {"A": a, "B": b})
    assert bound.p == pytest.approx(stats.ttest_1samp(a, 2.98).pvalue)
    assert judged(below("B", "A"), {"A": [3.0], "B": [2.0]}).p is None
    assert judged(below("B", "A"), {"A": [3.0, 4.0], "B": [2.0, 3.0]}).p == 0


@pytest.mark.parametrize(("p", "shown"), [(None, "–"), (0.0004, "< 0.001"), (0.0123, "0.012")])
def test_p_is_shown_with_three_decimals(p, shown):
    assert numbers.p_value(p) == shown
