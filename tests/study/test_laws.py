"""Laws of the loss: synthetic sweeps give their constants back, and what cannot be told is said."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from dsmoe_jax.study import laws, resampling
from dsmoe_jax.study.resampling import interval, resampled_means

SPLITS = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
ONE = np.ones(5)
CONSTANTS = {
    "c": 0.5, "g": 2.0, "a": 18.0, "b": 30.0, "gamma": 0.6, "alpha": 0.115, "beta": 0.15,
}  # fmt: skip
COMPUTE = np.array([1e12, 4e12, 1e13, 5e13])


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(resampling, "RESAMPLES", 80)


def sweep(G=SPLITS, N=(1e8, 4e8, 1.6e9), D=(2e9, 8e9, 3e10)):
    """Every combination, and the law's losses."""
    G_P, N_P, D_P = (x.ravel() for x in np.meshgrid(G, N, D, indexing="ij"))
    k = CONSTANTS
    small = (k["g"] / G_P ** k["gamma"] + k["a"]) / N_P ** k["alpha"]
    return G_P, N_P, D_P, k["c"] + small + k["b"] / D_P ** k["beta"]


def seeds_of(loss_P, rng, count=4, common=0.02, noise=0.002):
    """Losses of several seeds: noise, and a part that all models of a seed share."""
    shared_S = rng.normal(0, common, (count, 1))
    return loss_P + shared_S + rng.normal(0, noise, (count, len(loss_P)))


def test_a_synthetic_sweep_gives_its_constants_back():
    G_P, N_P, D_P, loss_P = sweep()
    fit = laws.fit_law("full", {"G": G_P, "N": N_P, "D": D_P}, loss_P)
    assert fit.converged
    assert fit.constants == pytest.approx(CONSTANTS, rel=1e-5)
    np.testing.assert_allclose(fit.predict(G=G_P, N=N_P, D=D_P), loss_P, rtol=1e-9)
    assert (fit.spare, fit.remarks()) == (45 - 7, [])


def test_with_noise_the_constants_are_inside_their_intervals():
    *sizes, loss_P = sweep()
    losses_SP = seeds_of(loss_P, np.random.default_rng(1))
    found = laws.granularity_law(*sizes, losses_SP)
    assert found.fit.form == "full"
    for name, value in CONSTANTS.items():
        low, high = found.interval(name)
        assert low < value < high, name


def test_at_one_size_the_fit_is_that_of_curve_fit():
    loss_P = 3 + 0.5 / SPLITS**0.58 + np.random.default_rng(1).normal(0, 0.003, 5)
    fit = laws.fit_law("one N and D", {"G": SPLITS}, loss_P)
    theirs, _ = optimize.curve_fit(
        lambda G, c, g, gamma: c + g / G**gamma, SPLITS, loss_P, (3, 1, 1)
    )
    ours = [fit.constants[name] for name in ("c", "g", "gamma")]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch):
    """With three seeds; drawing whole seeds would give 75 % at most."""
    rng = np.random.default_rng(2)
    truth = 3 + 0.5 / SPLITS**0.58
    contrast = np.array([1.0, -2.0, 0.5, 0.3, 0.2])
    inside = 0
    monkeypatch.setattr(resampling, "RESAMPLES", 300)
    for _ in range(400):
        means_RP = resampled_means(seeds_of(truth, rng, count=3))
        low, high = interval(means_RP @ contrast)
        inside += low < truth @ contrast < high
    assert 0.92 < inside / 400 < 0.98
    monkeypatch.setattr(resampling, "RESAMPLES", 80)
    inside = 0
    for _ in range(25):
        losses_SP = seeds_of(truth, rng, count=3)
        found = laws.estimate("one N and D", {"G": SPLITS}, losses_SP)
        low, high = found.interval("gamma")
        inside += low < 0.58 < high
    assert inside >= 21


def test_the_interval_of_a_mean_is_students(monkeypatch):
    monkeypatch.setattr(resampling, "RESAMPLES", 20_000)
    losses_SP = np.array([[4.5, 1.0], [4.42, 1.0], [4.61, 1.0]])
    means_RP = resampled_means(losses_SP)
    want = stats.ttest_1samp(losses_SP[:, 0], 0).confidence_interval(0.95)
    np.testing.assert_allclose(interval(means_RP[:, 0]), want, atol=0.01)
    np.testing.assert_allclose(means_RP[:, 1], 1.0)


def test_seeds_are_resampled_with_all_their_arms():
    """An effect that all arms of a seed share leaves no trace in a difference."""
    losses_SP = np.array([[4.0], [5.0], [7.0]]) + np.array([0.0, 0.1])
    means_RP = resampled_means(losses_SP)
    np.testing.assert_allclose(means_RP[:, 1] - means_RP[:, 0], 0.1)
    assert np.ptp(means_RP[:, 0]) > 1


def test_one_seed_has_no_interval():
    assert resampled_means(np.ones((1, 5))) is None
    found = laws.granularity_law(SPLITS, ONE, ONE, (3 + 1 / SPLITS)[None])
    assert found.interval("gamma") is None
    assert found.band(G=SPLITS) is None


@pytest.mark.parametrize(
    ("sizes", "form"),
    [({"N": (1e8,), "D": (2e9,)}, "one N and D"), ({"D": (2e9,)}, "one D"), ({}, "full")],
)
def test_the_data_decide_which_form_is_fitted(sizes, form):
    *values, loss_P = sweep(**sizes)
    found = laws.granularity_law(*values, loss_P[None])
    assert found.fit.form == form
    assert found.reason
    np.testing.assert_allclose(found.fit.constants["gamma"], 0.6, rtol=1e-4)


@pytest.mark.parametrize(
    ("G_P", "N_P", "D_P", "message"),
    [
        ([1, 2, 2], [1, 1, 1], [1, 1, 1], r"granularities=\[1.0, 2.0\]: the law needs three"),
        (SPLITS, ONE, [1, 2, 3, 4, 5], r"tokens=\[1.0, 2.0.*\]: differ between models of one size"),
        (SPLITS, SPLITS, ONE, r"models=5: G and N must vary independently, in more than 5 models"),
        ([*SPLITS, 32, 64], [*SPLITS, 32, 64], np.ones(7), r"models=7: G and N must vary indep"),
    ],
)
def test_a_sweep_that_cannot_tell_the_terms_apart_is_refused(G_P, N_P, D_P, message):
    with pytest.raises(ValueError, match=message):
        laws.granularity_form(G_P, N_P, D_P)


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"losses=\[1.0, nan, 1.0\]: must be finite"):
        laws.fit_law("compute", {"C": [1, 2, 3]}, [1, math.nan, 1])
    with pytest.raises(ValueError, match=r"C=\[1.0, 0.0, 3.0\]: must be finite and above 0"):
        laws.fit_law("compute", {"C": [1, 0, 3]}, [3, 2, 1])
    with pytest.raises(ValueError, match=r"compute=\[1.0, 1.1, 1.2\]: the law needs three"):
        laws.compute_law([1, 1.1, 1.2], np.ones((1, 3)))


def test_a_loss_that_rises_with_granularity_has_no_exponent():
    fit = laws.fit_law("one N and D", {"G": SPLITS}, 3 + 0.1 * np.log(SPLITS))
    assert (fit.constants["g"], fit.constants["gamma"]) == (0, None)
    assert any("gamma does not exist" in remark for remark in fit.remarks())
    np.testing.assert_allclose(fit.predict(G=SPLITS), 3 + 0.1 * np.log(SPLITS).mean())


def test_an_exponent_at_the_edge_of_its_range_is_said():
    fit = laws.fit_law("one N and D", {"G": SPLITS}, 5 - 0.05 * np.log(SPLITS))
    assert any("gamma is at the edge of its range, 0.02" in remark for remark in fit.remarks())
    fit = laws.fit_law("one N and D", {"G": SPLITS}, [3.5, 3, 3, 3, 3])
    assert any("gamma is at the edge of its range, 4" in remark for remark in fit.remarks())


def test_as_many_constants_as_points_are_said_to_test_nothing():
    fit = laws.fit_law("compute", {"C": COMPUTE[:3]}, 2 + 40 / COMPUTE[:3] ** 0.1)
    assert fit.remarks() == ["3 constants for 3 models: nothing is left to test the law."]


def test_a_floor_is_fitted_only_where_it_can_be_told():
    loss_P = 2 + 40 / COMPUTE**0.1
    losses_SP = seeds_of(loss_P, np.random.default_rng(3), noise=1e-4)
    known = laws.compute_law(COMPUTE, losses_SP)
    assert known.fit.constants["E"] == pytest.approx(2, abs=0.2)
    for few in (losses_SP[:1], losses_SP[:, :3], seeds_of(loss_P, np.random.default_rng(3), 3, 1)):
        found = laws.compute_law(COMPUTE[: few.shape[1]], few)
        assert found.fit.form == "compute, E = 0"
        assert "set to 0" in found.reason


@given(times=st.floats(0.05, 20), floor=st.sampled_from([0.0, 1.7]), unit=st.floats(1e6, 1e20))
@settings(max_examples=20, deadline=None)
def test_a_loss_that_k_times_the_compute_makes_counts_as_k(times, floor, unit):
    """Whatever the unit of compute."""
    C_P = unit * np.array([1.0, 3.0, 10.0, 40.0])
    fit = laws.fit_law("compute", {"C": C_P}, floor + 3 / (C_P / unit) ** 0.2)
    loss = floor + 3 / (3 * times) ** 0.2
    assert laws.effective_compute(fit, loss, C_P[1]) == pytest.approx(times, rel=1e-3)


def test_a_loss_below_the_floor_is_never_reached():
    fit = laws.fit_law("compute", {"C": COMPUTE}, 2 + 40 / COMPUTE**0.1)
    assert laws.compute_for(fit, 1.99) == math.inf
    flat = laws.fit_law("compute", {"C": COMPUTE}, [3.0, 3.1, 3.2, 3.3])
    with pytest.raises(ValueError, match="the baseline's loss does not fall with compute"):
        laws.compute_for(flat, 3.0)


def test_reach_counts_how_far_outside_a_value_is():
    fit = laws.fit_law("compute", {"C": COMPUTE}, 2 + 40 / COMPUTE**0.1)
    values = [laws.reach(fit, "C", c) for c in (1e11, 2e12, 5e14)]
    assert values == pytest.approx([10, 1, 10])
