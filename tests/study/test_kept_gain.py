"""The share of a gain that an arm keeps: by hand, by brute force, and beside the verdicts."""

import numpy as np
import pytest
from scipy import stats

from dsmoe_jax.report.gain_analyses import kept_shares
from dsmoe_jax.study.claims import keeps
from dsmoe_jax.study.experiment import Arm, Experiment, Gain
from dsmoe_jax.study.kept_gain import kept
from dsmoe_jax.study.results import Comparison, Row
from dsmoe_jax.study.verdicts import HOLDS, REVERSED, UNDECIDED, judge

GAIN = Gain("dense", "mixture")
ARMS = (Arm("dense", "dense_2b"), Arm("student", "hash_2b"), Arm("mixture", "dsmoe_2b"))
LOSSES = {
    "dense": [4.43, 4.46, 4.45],
    "student": [4.38, 4.40, 4.40],
    "mixture": [4.29, 4.31, 4.28],
}


def comparison(losses=LOSSES, claims=()):
    experiment = Experiment(
        "experiments.test", "", "", "", ARMS, claims=claims, gain=GAIN, analyses=("kept_shares",)
    )
    rows = tuple(
        Row(label, seed, "", "", {"validation_loss": value, "tokens": 1})
        for label, values in losses.items()
        for seed, value in enumerate(values)
    )
    return Comparison(experiment, "smoke", ARMS, rows, {}, "")


def differences(losses=LOSSES):
    dense, student, mixture = (np.array(losses[arm.label]) for arm in ARMS)
    return dense - student, dense - mixture


def test_the_interval_has_the_shares_that_a_t_test_does_not_refuse():
    """Fieller's, by brute force."""
    part_S, gain_S = differences()
    share, interval = kept(part_S, gain_S)
    assert share == pytest.approx(part_S.mean() / gain_S.mean())
    shares = np.linspace(-1, 2, 3001)
    left = stats.ttest_1samp(part_S - shares[:, None] * gain_S, 0, axis=1)
    inside = shares[left.pvalue > 0.05]
    np.testing.assert_allclose(interval, (inside[0], inside[-1]), atol=2e-3)


def test_verdicts_turn_at_the_ends_of_the_interval():
    low, high = kept(*differences()).interval
    for share, at_least in ((low - 0.01, HOLDS), (low + 0.01, UNDECIDED), (high + 0.01, REVERSED)):
        opposite = {HOLDS: REVERSED, REVERSED: HOLDS, UNDECIDED: UNDECIDED}[at_least]
        claims = (keeps("student", GAIN, at_least=share), keeps("student", GAIN, at_most=share))
        found = [finding.verdict for finding in judge(comparison(claims=claims))]
        assert found == [at_least, opposite]


def test_claims_by_hand():
    """(4.4 - 4.3) / (4.4 - 4.2) is a half."""
    losses = {"dense": [4.4], "student": [4.3], "mixture": [4.2]}
    claims = (keeps("student", GAIN, at_least=0.3), keeps("student", GAIN, at_most=0.4))
    first, second = judge(comparison(losses, claims))
    assert first.claim.text == "student keeps at least 30 % of the gain"
    assert (first.verdict, first.ours) == (HOLDS, pytest.approx(0.1 - 0.3 * 0.2))
    assert (second.verdict, second.ours) == (REVERSED, pytest.approx(0.4 * 0.2 - 0.1))
    with pytest.raises(ValueError, match="at_least=None, at_most=None: give one of the two"):
        keeps("student", GAIN)


def test_without_a_gain_there_is_no_share():
    assert kept([0.1], [-0.1]) is None
    assert kept([0.1], [0.2]) == (0.5, None)
    assert kept([0.1, 0.2], [0.5, -0.3]).interval is None


def test_the_report_has_a_row_for_each_other_arm():
    _, said, table, note = kept_shares(comparison(), None)
    assert "mixture is 0.153 nats per token better than dense" in said.text
    assert [row[0] for row in table.rows] == ["student"]
    assert table.rows[0][2] == "35 %"
    assert "Seeds, which all have: 0, 1, 2" in note.text
    _, said = kept_shares(comparison({"dense": [4.4], "student": [4.3]}), None)
    assert said.text.startswith("No seed is finished")
    _, said = kept_shares(comparison({**LOSSES, "mixture": [5.0, 5.0, 5.0]}), None)
    assert said.text == "There is no gain between mixture and dense, so no share of it either."
    one = kept_shares(comparison({label: losses[:1] for label, losses in LOSSES.items()}), None)
    assert one[2].rows[0][2:] == ["36 %", "–"]


def test_bad_gains_are_refused():
    with pytest.raises(ValueError, match=r"test: arm 'none': must be one of"):
        Experiment("experiments.test", "", "", "", ARMS, gain=Gain("dense", "none"))
    with pytest.raises(ValueError, match=r"test: gain=None: kept_shares needs one"):
        Experiment("experiments.test", "", "", "", ARMS, analyses=("kept_shares",))
