"""Effective compute: the baseline is found, is the same experiment's, and counts right."""

import dataclasses
import math
import pathlib
import shutil

import numpy as np
import pytest
from made_up_runs import FakeTrain, run_made_up

from dsmoe_jax.model import size
from dsmoe_jax.study import baselines, effective, resampling
from dsmoe_jax.study.baselines import BaselineRuns, NoBaseline
from dsmoe_jax.study.experiment import Baseline
from experiments.laws import sizes
from experiments.v1 import fig6

COMPUTE = np.array([1e12, 4e12, 1e13, 5e13])
LABELS = ("S", "M", "L", "XL")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(resampling, "RESAMPLES", 40)


def law(compute):
    """A loss that falls with compute, from 5 at 1e12 FLOPs."""
    return 2 + 3 / (compute / 1e12) ** 0.2


def runs(losses_SP=None):
    """Made-up runs of a baseline; without losses those of the law, for one seed."""
    losses_SP = law(COMPUTE)[None] if losses_SP is None else losses_SP
    losses = {
        label: dict(enumerate(loss_S)) for label, loss_S in zip(LABELS, losses_SP.T, strict=True)
    }
    return BaselineRuns(LABELS, COMPUTE, losses, reference=1e13, path=pathlib.Path("results.jsonl"))


def test_a_loss_made_by_k_times_the_compute_counts_as_k():
    """Over three seeds, whose losses all shift together."""
    shift_S1 = np.array([[0.0], [0.05], [-0.04]])
    losses = {f"{k}": dict(enumerate(law(k * 1e13) + shift_S1[:, 0])) for k in (0.3, 1.0, 3.0)}
    found = effective.count_in(runs(law(COMPUTE) + shift_S1), losses, {k: 1.0 for k in losses})
    assert found.seeds == (0, 1, 2)
    for arm in found.arms:
        assert arm.times == pytest.approx(float(arm.label), rel=0.05)
        low, high = arm.interval
        assert low <= arm.times * 1.001
        assert high >= arm.times * 0.999
    # What arms and baseline share does not count: the interval of the reference's own is narrow.
    low, high = found.arms[1].interval
    assert high / low < 1.1


def test_the_reference_counts_as_one_whatever_the_law_leaves_over():
    losses_SP = law(COMPUTE) + np.array([0.03, -0.05, 0.04, 0.0])
    own = dict(enumerate(losses_SP[None, 2]))
    found = effective.count_in(runs(losses_SP[None]), {"A": own}, {"A": 1.0})
    assert found.law.fit.error > 0.01
    assert found.arms[0].times == pytest.approx(1)


def test_only_seeds_of_all_are_compared_and_one_has_no_interval():
    found = effective.count_in(runs(), {"A": {0: law(2e13), 1: 99.0}}, {"A": 1.0})
    assert found.arms[0].loss == law(2e13)
    assert (found.seeds, found.arms[0].interval) == ((0,), None)


def test_a_loss_that_the_baseline_never_reaches_is_infinitely_far():
    losses_SP = law(COMPUTE) + np.array([[0.0], [1e-4]])
    found = effective.count_in(runs(losses_SP), {"A": {0: 1.5, 1: 1.5}}, {"A": 1.0})
    assert found.law.fit.form == "compute"
    (arm,) = found.arms
    assert (arm.times, arm.beyond) == (math.inf, math.inf)


def test_what_cannot_be_counted_is_said():
    with pytest.raises(NoBaseline, match="No arm is finished yet"):
        effective.count_in(runs(), {}, {})
    with pytest.raises(NoBaseline, match="No seed is finished in all arms and in all models of"):
        effective.count_in(runs(), {"A": {7: 3.0}}, {"A": 1.0})
    few = dataclasses.replace(runs(), labels=LABELS[:2], compute_P=COMPUTE[:2])
    with pytest.raises(NoBaseline, match=r"gives no law: compute=.*: the law needs three models"):
        effective.count_in(few, {"A": {0: 3.0}}, {"A": 1.0})


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Directory with made-up runs of the baseline, whose losses follow the law, and of figure 6."""
    monkeypatch.setattr(baselines, "COMMITTED", tmp_path / "committed")
    losses = {"dsmoe_2b_half": 4.2}
    for arm in sizes.GSHARD.arms:
        config = arm.run_config("smoke", 0)
        losses[config.name] = law(1e4 * compute_of(arm))
    monkeypatch.setattr("made_up_runs.FINAL_LOSS", losses)
    return tmp_path / "runs"


def compute_of(arm):
    config = arm.run_config("smoke", 0)
    tokens = config.train.steps * config.tokens_per_step
    return size.flops_per_sequence(config) * tokens / config.data.sequence_length


def test_the_baseline_is_found_beside_the_experiment(trained):
    run_made_up(trained, FakeTrain(noise=0), sizes.EXPERIMENT, arms=("GShard, 50 %",))
    comparison = run_made_up(trained, FakeTrain(noise=0), fig6.EXPERIMENT)
    with pytest.raises(NoBaseline, match=r"GShard, 75 %, .* not finished; `python -m exper"):
        effective.count(comparison, trained)
    run_made_up(trained, FakeTrain(noise=0), sizes.EXPERIMENT)
    found = effective.count(comparison, trained)
    reference = sizes.EXPERIMENT.arm(sizes.GSHARD.reference)
    assert found.runs.reference == pytest.approx(compute_of(reference))
    gshard, half = found.arms
    assert (gshard.own, gshard.times) == (1, pytest.approx(1, rel=0.1))
    assert half.own < 1
    assert half.loss == 4.2


def test_results_of_other_runs_are_refused(trained):
    comparison = run_made_up(trained, FakeTrain(noise=0), fig6.EXPERIMENT)
    with pytest.raises(NoBaseline, match=r"no results of GShard at several sizes; `python -m"):
        baselines.find(comparison, trained)
    other = trained.with_name("other")
    run_made_up(other, FakeTrain(noise=0), sizes.EXPERIMENT, fingerprint="cd" * 32)
    shutil.copytree(other / "sizes-smoke", trained / "sizes-smoke")
    with pytest.raises(NoBaseline, match="is of other text than these runs"):
        baselines.find(comparison, trained)
    changed = dataclasses.replace(comparison, overrides={"train.log_every": 2})
    with pytest.raises(
        NoBaseline, match=r"made with other settings than these runs \(GShard, 50 %"
    ):
        baselines.find(changed, trained)


def test_results_that_come_with_the_repository_are_the_second_place(trained, tmp_path):
    run_made_up(tmp_path / "committed", FakeTrain(noise=0), sizes.EXPERIMENT)
    comparison = run_made_up(trained, FakeTrain(noise=0), fig6.EXPERIMENT)
    found = baselines.find(comparison, trained)
    assert found.path == tmp_path / "committed/sizes-smoke/results.jsonl"


def test_a_baseline_without_its_reference_is_refused():
    with pytest.raises(ValueError, match=r"reference='DeepSeekMoE, 50 %': must be an arm of sizes"):
        Baseline(sizes.EXPERIMENT, "GShard", "DeepSeekMoE, 50 %")
    with pytest.raises(ValueError, match="fig6: baseline=None: effective_compute needs one"):
        dataclasses.replace(fig6.EXPERIMENT, baseline=None)
