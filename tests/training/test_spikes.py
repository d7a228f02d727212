"""Spikes of the loss: seen as numpy sees them, and skipped or left behind without a trace.

The text of one batch is spoilt: its targets are a token that nobody has learnt to expect.
"""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsmoe_jax.config import replace
from dsmoe_jax.config.train import SpikesConfig
from dsmoe_jax.data.pipeline import train_batches
from dsmoe_jax.runs import events, going_on
from dsmoe_jax.runs.events import read_events
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.status import read_status
from dsmoe_jax.training import spikes
from dsmoe_jax.training.loop import NonFinite, train
from dsmoe_jax.training.spikes import SpikeWindow, TooManySpikes, judge
from dsmoe_jax.training.stages import StageRun
from dsmoe_jax.training.start import init_state
from dsmoe_jax.training.step import jit_train_step
from tests.tools.forked import run_script
from tests.tools.tiny import batch, tiny
from tests.training.test_loop import numbers, parameters

pytestmark = pytest.mark.usefixtures("shared_steps")
RULE = {
    "train.spikes.window": 4,
    "train.spikes.threshold": 3.0,
    "train.steps": 12,
    "train.eval_every": None,
    "train.checkpoint_every": 4,
    "train.keep_checkpoints": 9,
    "model.moe.router.bias_update_speed": 0.01,
}
SPOILT = 6  # the number of the batch, from 0: step 7, and without what is left out later
KILLED = """
import os, signal, sys
from dsmoe_jax.config import *
from dsmoe_jax.training import loop, run_log
from tests.training.test_spikes import spoil

spoil({corpus!r}, setattr)
def row_or_kill(*arguments, original=run_log.training_row, rows=[]):
    rows.append(1)
    if len(rows) == {rows}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

run_log.training_row = row_or_kill
loop.train({config!r}, sys.argv[1], progress=False)
"""


def spoil(corpus, set_attribute, value=511):
    """From now on the batch has other targets; a value of None has no finite loss."""
    batches = train_batches(corpus, 64, 4, 0)
    wanted = [next(batches)["tokens_BS"] for _ in range(SPOILT + 1)][-1]
    original = StageRun.next_batch

    def next_batch(self, step):
        found = original(self, step)
        if np.array_equal(found["tokens_BS"], wanted):
            if value is None:
                mask_BS = found["loss_mask_BS"]
                return {**found, "loss_mask_BS": mask_BS * jnp.float32(np.inf)}
            targets_BS = found["targets_BS"]
            new = jax.device_put(np.full(targets_BS.shape, value, np.int32), targets_BS.sharding)
            return {**found, "targets_BS": new}
        return found

    set_attribute(StageRun, "next_batch", next_batch)


@pytest.fixture
def config(tiny_config):
    """`config("skip")`, and more dotted keys."""
    return lambda action, **more: tiny_config(**{**RULE, "train.spikes.action": action, **more})


@pytest.fixture(scope="module")
def runs(tiny_config, tiny_corpus, tmp_path_factory):
    """Workdirs of runs with the spoilt batch that nothing disturbed, by action."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        spoil(str(tiny_corpus), patch.setattr)
        for action in ("warn", "skip", "rewind"):
            found[action] = tmp_path_factory.mktemp("spiked") / action
            rule = {**RULE, "train.spikes.action": action}
            train(tiny_config(**rule), found[action], progress=False)
    return found


def spikes_of(workdir):
    return [event for event in read_events(workdir) if event["event"] == events.SPIKE]


def without(rows, *keys):
    return [{k: v for k, v in row.items() if k not in keys} for row in rows]


@pytest.mark.parametrize("watch", ["loss", "grad_norm"])
@pytest.mark.parametrize("action", ["warn", "skip"])
def test_spikes_are_those_of_numpy(watch, action):
    """Over a series with jumps, among them one that is not finite, and a first step of the rule."""
    rng = np.random.default_rng(0)
    series = 3 + 0.1 * rng.standard_normal(60)
    series[[3, 20, 33, 34]] += 5
    series[45] = np.nan
    rule = SpikesConfig(action=action, watch=watch, window=8, threshold=6.0, from_step=3)
    window = SpikeWindow(jnp.zeros(8, jnp.float32), jnp.int32(0), jnp.int32(0))
    judge_step = jax.jit(lambda *given: judge(rule, *given))
    kept, in_a_row = [], 0
    for i, value in enumerate(np.float32(series)):
        loss, norm = (value, 1.0) if watch == "loss" else (2.0, value)
        judged, window = judge_step(window, jnp.int32(i), jnp.float32(loss), jnp.float32(norm))
        last, wanted = np.array(kept[-8:], np.float64), False
        if len(last) == 8:
            deviation = 1.4826 * np.median(np.abs(last - np.median(last)))
            deviations = (value - np.median(last)) / deviation
            wanted = bool(deviations > 6) or not np.isfinite(value)
            np.testing.assert_allclose(judged.deviations, deviations, rtol=1e-3)
        else:
            assert np.isnan(judged.deviations)
        assert bool(judged.is_spike) == wanted, i
        in_a_row = in_a_row + 1 if wanted and action == "skip" else 0
        assert int(judged.in_a_row) == in_a_row
        if i >= 2 and np.isfinite(value) and not (wanted and action == "skip"):
            kept.append(value)
    assert not any(np.isin(np.float32(series[[0, 1]]), kept)), "before the first step of the rule"


def test_a_skipped_step_changes_nothing():
    """Every bit of parameters, moments and router bias; the step and the schedule count on."""
    config = tiny(**{**RULE, "train.spikes.action": "skip"})
    step = jit_train_step(config, np.ones(512, np.float32))
    state = init_state(config)
    for i in range(6):
        state, metrics = step(state, batch(config, i))
        assert not metrics.judged.is_spike
    before = jax.tree.map(np.asarray, state)
    spoilt = batch(config, 6)
    spoilt["targets_BS"] = np.full_like(spoilt["targets_BS"], 511)
    after, metrics = step(state, spoilt)
    assert metrics.judged.is_spike
    assert metrics.judged.in_a_row == 1
    assert metrics.loss > before.spikes.values_W.max() + 0.3
    for name in ("params", "other", "spikes"):
        got, old = getattr(after, name), getattr(before, name)
        if name == "spikes":
            got, old = got._replace(in_a_row=0), old._replace(in_a_row=0)
        jax.tree.map(np.testing.assert_array_equal, got, old)

    def is_schedule(x):
        return isinstance(x, optax.ScaleByScheduleState)

    pairs = zip(
        jax.tree.leaves(after.opt_state, is_leaf=is_schedule),
        jax.tree.leaves(before.opt_state, is_leaf=is_schedule),
        strict=True,
    )
    for got, old in pairs:
        if is_schedule(got):
            assert int(got.count) == int(old.count) + 1 == 7
        else:
            np.testing.assert_array_equal(got, old)
    assert int(after.step) == 7
    after, metrics = step(after, batch(config, 7))
    assert not metrics.judged.is_spike
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), after.params, before.params)
    assert all(jax.tree.leaves(moved)), "the next one does"


def test_warn_only_says_so(runs, config, tiny_config, tiny_corpus, tmp_path, monkeypatch):
    """The step is in the log as it was, also where it was skipped."""
    spoil(str(tiny_corpus), monkeypatch.setattr)
    off = {key: value for key, value in RULE.items() if "spikes" not in key}
    train(tiny_config(**off), tmp_path / "off", progress=False)
    rows = {name: numbers(workdir) for name, workdir in runs.items()}
    losses, wanted = ([row["loss"] for row in r] for r in (rows["warn"], numbers(tmp_path / "off")))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)  # another program rounds otherwise
    (event,) = spikes_of(runs["warn"])
    assert (event["action"], event["spike_step"]) == ("warn", 7)
    assert event["value"] == pytest.approx(rows["warn"][6]["loss"], rel=1e-6)
    assert event["median"] == pytest.approx(
        np.median([row["loss"] for row in rows["warn"][2:6]]), rel=1e-6
    )
    assert "spikes: 1 x warn; the last in step 7" in read_status(runs["warn"]).troubles
    assert rows["skip"][6]["loss"] == pytest.approx(event["value"], rel=1e-6), "logged as it was"
    assert rows["skip"][7]["loss"] != rows["warn"][7]["loss"]
    assert [row["skipped_steps"] for row in rows["skip"]] == [0] * 6 + [1] * 6


def test_rewind_is_a_run_that_left_the_batches_out(runs, config, tmp_path):
    """From its beginning, by the user's word: the same numbers, to the last bit."""
    same = config("warn", **{"train.skip_batches": ((5, 3),), "train.spikes.threshold": 1e6})
    train(same, tmp_path / "run", progress=False)
    found, wanted = numbers(runs["rewind"]), numbers(tmp_path / "run")
    assert without(found, "left_out_batches") == without(wanted, "left_out_batches")
    assert [row["left_out_batches"] for row in found] == [0] * 4 + [3] * 8
    jax.tree.map(
        np.testing.assert_array_equal, parameters(runs["rewind"]), parameters(tmp_path / "run")
    )
    (event,) = spikes_of(runs["rewind"])
    assert (event["action"], event["spike_step"], event["to_step"]) == ("rewind", 7, 4)


def test_without_a_checkpoint_it_begins_anew(config, tiny_corpus, tmp_path, monkeypatch):
    """Back to step 0, with the parameters that it began with."""
    short = {"train.steps": 8, "train.checkpoint_every": 100}
    spoil(str(tiny_corpus), monkeypatch.setattr)
    train(config("rewind", **short), tmp_path / "run", progress=False)
    (event,) = spikes_of(tmp_path / "run")
    assert (event["spike_step"], event["to_step"]) == (7, 0)
    same = {"train.skip_batches": ((1, 7),), "train.spikes.threshold": 1e6}
    train(config("warn", **short, **same), tmp_path / "same", progress=False)
    found, wanted = numbers(tmp_path / "run"), numbers(tmp_path / "same")
    assert without(found, "left_out_batches") == without(wanted, "left_out_batches")


@pytest.mark.parametrize(
    ("action", "rows"),
    [("skip", 11), ("rewind", 8)],  # in step 11; and again in step 6
)
def test_killed_on_the_way(runs, config, tiny_corpus, tmp_path, monkeypatch, action, rows):
    """`kill -9` after the decision; the run that goes on comes to the same one."""
    script, workdir = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED.format(config=config(action), corpus=str(tiny_corpus), rows=rows))
    child = run_script(script, str(workdir))
    assert child.code == -signal.SIGKILL, child.err
    assert len(spikes_of(workdir)) == 1
    spoil(str(tiny_corpus), monkeypatch.setattr)
    result = train(config(action), workdir, progress=False)
    assert result.resumed_from in ((4, 8) if action == "skip" else (4,))
    assert numbers(workdir) == numbers(runs[action])
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(runs[action]))
    # The rewinding run meets the spike a second time: it is one spike all the same.
    assert read_status(workdir).troubles[0] == f"spikes: 1 x {action}; the last in step 7"


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_decisions_outlive_a_restart(runs, config, tmp_path, action):
    """A run that goes on from a later checkpoint counts and reads on where it was."""
    workdir = shutil.copytree(runs[action], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/12")
    (workdir / "evaluation.json").unlink()
    assert train(config(action), workdir, progress=False).resumed_from == 8
    assert numbers(workdir) == numbers(runs[action])
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(runs[action]))


def test_a_loss_that_is_not_finite(config, tiny_corpus, tmp_path, monkeypatch):
    """It ends a run that only warns; one that skips goes on, in the first steps too."""
    spoil(str(tiny_corpus), monkeypatch.setattr, None)
    early = {"train.spikes.window": 100, "train.steps": 8}
    with pytest.raises(NonFinite, match=r"step 7: loss="):
        train(config("warn", **early), tmp_path / "warn", progress=False)
    train(config("skip", **early), tmp_path / "skip", progress=False)
    rows = read_rows(tmp_path / "skip")
    assert np.isnan(rows[6]["loss"])
    assert np.isfinite(rows[7]["loss"])
    assert json.loads((tmp_path / "skip/evaluation.json").read_text())["loss"] < 6.5


def test_the_limit(config, tiny_corpus, tmp_path, monkeypatch):
    """A level that is higher for good is no spike: the rule gives up, and loses nothing."""
    original = StageRun.next_batch

    def spoilt_for_good(self, step):
        found = original(self, step)
        if step < 7:
            return found
        targets_BS = found["targets_BS"]
        new = jax.device_put(np.full(targets_BS.shape, 511, np.int32), targets_BS.sharding)
        return {**found, "targets_BS": new}

    monkeypatch.setattr(StageRun, "next_batch", spoilt_for_good)
    limit = {"train.spikes.limit": 2}
    with pytest.raises(TooManySpikes, match=r"step 8: 2 steps in a row are spikes") as error:
        train(config("skip", **limit), tmp_path / "skip", progress=False)
    assert "\n" not in str(error.value)
    status = read_status(tmp_path / "skip")
    assert status.state == "failed"
    assert [checkpoint.step for checkpoint in status.checkpoints] == [4]


def test_the_limit_of_returns(config):
    """So many to one checkpoint; to a later one it counts anew."""
    decisions = spikes.Decisions(config("rewind", **{"train.spikes.limit": 2}))
    decisions.rewind(7, 4)
    decisions.rewind(6, 4)
    assert decisions.left_out == {5: 5}
    decisions.rewind(10, 8)
    decisions.rewind(12, 8)
    with pytest.raises(TooManySpikes, match=r"step 9: a spike again after 2 returns to step 8"):
        decisions.rewind(9, 8)


def test_what_was_read_is_counted_across_stages(tiny_config):
    """Two steps of four sequences and three of two: in batches of four, rounded up, four."""
    config = tiny_config(
        **{
            "train.spikes.action": "rewind",
            "train.stages.share": (0.4, 0.6),
            "train.stages.train.global_batch_size": (4, 2),
            "train.skip_batches": ((1, 1), (3, 2)),
        }
    )
    decisions = spikes.Decisions(config)
    decisions.rewind(7, 2)
    assert decisions.left_out == {3: 4}
    assert decisions.config().train.skip_batches == ((1, 1), (3, 6))


def test_the_rule_may_come_later(config, tiny_config):
    """From a step on: the past stays what it was."""
    off = tiny_config(**{k: v for k, v in RULE.items() if "spikes" not in k})
    later = config("skip", **{"train.spikes.from_step": 9})
    assert going_on.first_changed(off, later) == 9
    assert going_on.first_changed(later, config("rewind", **{"train.spikes.from_step": 5})) == 5
    assert going_on.first_changed(later, off) == 9


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("action", "panic", "train.spikes.action='panic': must be warn, skip, rewind"),
        ("watch", "accuracy", "must be 'loss' or 'grad_norm'"),
        ("threshold", 0.0, "must be > 0"),
        ("window", 3, "at least 4"),
        ("limit", 0, "must be > 0"),
    ],
)
def test_impossible_rules_are_refused(tiny_config, tmp_path, key, value, says):
    with pytest.raises(ValueError, match=says):
        train(replace(tiny_config(), **{f"train.spikes.{key}": value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
