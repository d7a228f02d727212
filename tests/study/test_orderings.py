"""What the runs say about the paper's orderings, on losses chosen by hand."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from dsmoe_jax.study import orderings
from dsmoe_jax.study.orderings import HOLDS, MISSING, REVERSED, UNDECIDED
from dsmoe_jax.study.results import Comparison, Row
from dsmoe_jax.study.spec import Arm, Experiment

ARMS = (Arm("A", "dense_2b", paper_loss=2.0), Arm("B", "hash_2b", paper_loss=1.9))
C = Arm("C", "dsmoe_2b", paper_loss=1.9)


def comparison(losses: dict[str, list[float | None]], arms=(*ARMS, C), order=()) -> Comparison:
    experiment = Experiment("test", "", "", "", arms=arms, equal=(), order=order)
    rows = tuple(
        Row(label, seed, "", "", 0, 0, 0, 0, 0.0, validation_loss=loss)
        for label, values in losses.items()
        for seed, loss in enumerate(values)
    )
    return Comparison(experiment, "smoke", arms, rows, {}, "")


def verdicts(**losses) -> dict[str, str]:
    found = orderings.compare(comparison(losses))
    return {o.better.label + o.worse.label: o.verdict for o in found}


def test_equal_losses_in_the_paper_are_no_ordering():
    assert set(verdicts(A=[3.0], B=[2.9], C=[2.8])) == {"BA", "CA"}


def test_an_order_without_losses_is_taken_as_given():
    arms = tuple(dataclasses.replace(arm, paper_loss=None) for arm in (*ARMS, C))
    losses = {"A": [1.0], "B": [2.0], "C": [3.0]}
    found = orderings.compare(comparison(losses, arms, order=("C", "A")))
    assert [(o.worse.label, o.better.label, o.paper, o.verdict) for o in found] == [
        ("C", "A", None, HOLDS)
    ]


def test_clear_differences_hold_or_are_reversed():
    assert verdicts(A=[3.0, 3.01], B=[2.9, 2.91], C=[3.5, 3.51]) == {"BA": HOLDS, "CA": REVERSED}


def test_what_all_seeds_share_is_not_noise():
    """Seed 1 is worse for all by the same amount: that says nothing about the arms."""
    assert verdicts(A=[3.0, 4.0], B=[2.9, 3.9], C=[2.8, 3.8]) == {"BA": HOLDS, "CA": HOLDS}


def test_differences_within_the_noise_are_not_decided():
    assert verdicts(A=[3.0, 3.1], B=[3.05, 2.95], C=[2.0, 2.1]) == {"BA": UNDECIDED, "CA": HOLDS}


def test_a_single_seed_gives_a_sign_and_no_interval():
    found = orderings.compare(comparison({"A": [3.0], "B": [2.9], "C": [3.1]}))
    assert [o.verdict for o in found] == [HOLDS, REVERSED]
    assert [o.half_width for o in found] == [None, None]


def test_a_missing_arm_is_missing_and_others_are_judged():
    assert verdicts(A=[3.0, 3.01], B=[2.9, 2.91], C=[None, None]) == {"BA": HOLDS, "CA": MISSING}


def test_only_seeds_that_all_arms_have_count():
    found = orderings.compare(comparison({"A": [3.0, 9.0], "B": [2.9, None], "C": [2.8, None]}))
    assert found[0].ours == pytest.approx(0.1)
    assert found[0].half_width is None


def test_two_arms_give_the_interval_of_the_paired_t_test():
    a, b = np.array([3.0, 3.2, 3.1]), np.array([2.9, 2.95, 3.05])
    both = comparison({"A": list(a), "B": list(b)}, arms=ARMS)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    (found,) = orderings.compare(both)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2)


def test_orderings_of_arms_that_were_not_chosen_are_left_out():
    some = dataclasses.replace(comparison({"A": [3.0], "B": [2.9]}), arms=ARMS)
    assert [(o.worse.label, o.better.label) for o in orderings.compare(some)] == [("A", "B")]
