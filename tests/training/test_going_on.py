"""A run that goes on with another config is the run of that config from its beginning."""

import itertools
import json
import math
import shutil
import signal
from unittest import mock

import jax
import numpy as np
import pytest

from dsmoe_jax.config import replace, stage_of, stages_of, tokens_after
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.data.pipeline import train_batches
from dsmoe_jax.runs import going_on
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_config, read_evaluation
from dsmoe_jax.training import loop, trainer
from dsmoe_jax.training.loop import NonFinite, train
from dsmoe_jax.training.optimizer import make_schedule
from dsmoe_jax.training.stages import StageRun
from tests.tools.forked import run_script
from tests.training.test_loop import numbers, parameters

LONGER = {"train.steps": 13, "train.schedule_steps": 10}
SPIKE = {  # before step 7 three batches, and two more before step 9
    "train.skip_batches": ((7, 3), (9, 2)),
    "optimizer.rate_changes": ((7, 0.5), (8, 0.1)),
}
KILLED = """
import os, signal, sys
from dsmoe_jax.config import *
from dsmoe_jax.training import loop, run_log

def row_or_kill(*arguments, original=run_log.training_row, rows=[]):
    rows.append(1)
    if len(rows) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

run_log.training_row = row_or_kill
loop.train({config!r}, sys.argv[1], progress=False)
"""


def assert_same_run(workdir, undisturbed):
    """Every number of every training row, and every bit of the final parameters."""

    def trained(directory):
        rows = [row for row in numbers(directory) if "loss" in row]
        return [{k: v for k, v in row.items() if "validation" not in k} for row in rows]

    assert trained(workdir) == trained(undisturbed)
    (step_a, a), (step_b, b) = parameters(workdir), parameters(undisturbed)
    assert step_a == step_b
    jax.tree.map(np.testing.assert_array_equal, a, b)
    loss = read_evaluation(undisturbed)["loss"]
    assert read_evaluation(workdir)["loss"] == loss


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a run of ten steps with checkpoints of steps 9 and 10."""
    return shutil.copytree(finished_run[0], tmp_path / "run")


@pytest.fixture(scope="module")
def spiked(tiny_config, tmp_path_factory):
    """The workdir of a run that left batches out, and lowered its rate, from its beginning on."""
    workdir = tmp_path_factory.mktemp("runs") / "spiked"
    train(tiny_config(**SPIKE), workdir, progress=False)
    return workdir


def test_a_finished_run_is_trained_for_longer(run, tiny_config, tmp_path):
    """At the rate that its schedule ended with; its past is what it was."""
    config = tiny_config(**LONGER)
    assert train(config, run, progress=False).resumed_from == 10
    train(config, tmp_path / "undisturbed", progress=False)
    assert_same_run(run, tmp_path / "undisturbed")
    rates = {row["step"]: row["learning_rate"] for row in read_rows(run)}
    np.testing.assert_allclose([rates[10], rates[13]], 0.01 * 0.316**2, rtol=1e-6)
    change = json.loads((run / "history/00000001/change.json").read_text())
    changed = {"train.steps": [10, 13], "train.schedule_steps": [None, 10]}
    assert change == {"changed": changed, "from_step": 10, "removed": []}
    assert read_config(run / "history/00000001") == tiny_config()
    assert train(config, run, progress=False).resumed_from == 13
    assert len(list((run / "history").iterdir())) == 1, "the same command changes nothing"


def test_a_longer_run_is_refused_another_past(run, tiny_config):
    """Shares of 13 steps would have been at other steps."""
    before = (run / "config.json").read_bytes()
    message = r"train\.steps=13: the run has 10, .* with train\.schedule_steps=10 it goes on at"
    with pytest.raises(ValueError, match=message):
        train(tiny_config(**{"train.steps": 13}), run, progress=False)
    assert (run / "config.json").read_bytes() == before
    assert not (run / "history").exists()


def test_a_diverged_run_goes_on_past_the_batches(spiked, tiny_config, tmp_path, monkeypatch):
    """It ends in step 8; with the skip the same command goes on from step 6, bit for bit."""
    workdir = tmp_path / "run"
    original = trainer.first_non_finite

    def diverges(metrics):
        return ("loss", math.nan) if len(read_rows(workdir)) == 7 else original(metrics)

    monkeypatch.setattr(trainer, "first_non_finite", diverges)
    with pytest.raises(NonFinite, match=r"step 8: loss=nan; .* checkpoint: step 6, in"):
        train(tiny_config(), workdir, progress=False)
    monkeypatch.undo()
    assert train(tiny_config(**SPIKE), workdir, progress=False).resumed_from == 6
    assert_same_run(workdir, spiked)


def test_going_back_needs_the_users_word(run, spiked, tiny_config):
    """Checkpoints, results and rows of the steps that are left are kept in the history."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    config = tiny_config(
        **{**SPIKE, "train.skip_batches": ((10, 1),), "optimizer.rate_changes": ()}
    )
    message = r"skip_batches would change step 10, .* at step 10; --go_back removes .* step 9 and"
    with pytest.raises(ValueError, match=message):
        train(config, run, progress=False)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    log = (run / "metrics.jsonl").read_bytes()
    assert train(config, run, progress=False, go_back=True).resumed_from == 9
    assert (run / "history/00000001/metrics.jsonl").read_bytes() == log
    old = read_evaluation(run / "history/00000001")
    assert old["loss"] != read_evaluation(run)["loss"]
    assert train(config, run, progress=False, go_back=True).resumed_from == 10, "only once"


def test_without_an_older_checkpoint_it_is_refused(run, tiny_config):
    with pytest.raises(ValueError, match=r"change step 7, .* at step 10; no checkpoint is older"):
        train(tiny_config(**SPIKE), run, progress=False, go_back=True)
    shutil.rmtree(run / "checkpoints")  # its results are still those of the old config
    with pytest.raises(ValueError, match=r"change step 7, .* at step 10; no checkpoint is older"):
        train(tiny_config(**SPIKE), run, progress=False, go_back=True)


def test_killed_on_the_way(spiked, tiny_config, tmp_path):
    """`kill -9` among the changed steps."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(config=tiny_config(**SPIKE)))
    workdir = tmp_path / "run"
    child = run_script(script, str(workdir))
    assert child.code == -signal.SIGKILL, child.err
    assert read_rows(workdir)[-1]["step"] == 7
    train(tiny_config(**SPIKE), workdir, progress=False)
    assert_same_run(workdir, spiked)


def test_batches_are_left_out_of_the_stream(tiny_config, tiny_corpus):
    """Stages of 4 and of 2 sequences: of the records of batches of 1 these are missing."""
    config = tiny_config(
        **{
            "train.stages.share": (0.5, 0.5),
            "train.stages.train.global_batch_size": (4, 2),
            "train.skip_batches": ((1, 1), (4, 2), (8, 3)),
        }
    )
    found, position = [], None
    for stage in stages_of(config):
        stage_run = StageRun(stage, open_corpus(config.data), position)
        for step in range(stage.first + 1, stage.end + 1):
            if step in (5, 9):  # as a run that goes on
                stage_run = StageRun(stage, open_corpus(config.data), stage_run.position())
            found += list(stage_run.next_batch(step)["tokens_BS"])
        position = stage_run.position()
    single = train_batches(tiny_corpus, 64, 1, config.train.seed)
    all_of_them = [batch["tokens_BS"][0] for batch in itertools.islice(single, 50)]
    # Steps 1-3 and 4-5 of four sequences, steps 6-7 and 8-10 of two.
    taken = [*range(4, 16), *range(24, 32), *range(32, 36), *range(42, 48)]
    np.testing.assert_array_equal(found, [all_of_them[i] for i in taken])
    assert tokens_after(config, 10) == len(taken) * 64, "what is left out is not trained on"


def test_rate_changes_multiply_the_schedule(tiny_config):
    """In stages and not, by stages of their own, each with its place in the data."""
    changes = {"optimizer.rate_changes": ((1, 2.0), (4, 0.5), (9, 0.1))}
    stages = {
        "train.stages.share": (0.3, 0.7),
        "train.stages.train.global_batch_size": (4, 2),
        "train.stages.optimizer.peak_learning_rate": (0.01, 0.02),
    }
    for parts in ({}, stages):
        config = tiny_config(**parts, **changes)
        assert [stage.end for stage in stages_of(config)] == [3, 8, 10]
        for step in range(1, 11):
            stage, plain = stage_of(config, step), stage_of(tiny_config(**parts), step)
            multiple = 2.0 * 0.5 ** (step >= 4) * 0.1 ** (step >= 9)
            base, found = (make_schedule(s.config.optimizer, 10)(step - 1) for s in (plain, stage))
            np.testing.assert_allclose(found, multiple * base, rtol=1e-6)
            first = plain.sequences + (stage.first - plain.first) * (
                4 if step < 4 or not parts else 2
            )
            assert stage.sequences == first


def test_shares_are_of_the_scheduled_steps(tiny_config):
    """A longer run has a longer last stage; a shorter one has only the first stages."""
    stages = {"train.stages.share": (0.3, 0.4, 0.3), "train.schedule_steps": 10}

    def ends(steps):
        config = tiny_config(**stages, **{"train.steps": steps})
        return [stage.end for stage in stages_of(config)]

    assert (ends(10), ends(14), ends(5)) == ([3, 7, 10], [3, 7, 14], [3, 5])


def test_only_a_run_with_a_step_left_checks_its_devices(run, tiny_config, tmp_path, monkeypatch):
    """Not one that is finished, or was killed before its evaluation; one that is made longer."""
    monkeypatch.setattr(loop, "check_devices", mock.Mock(side_effect=ValueError("were checked")))
    assert train(tiny_config(), run, progress=False, self_check=True).resumed_from == 10
    with pytest.raises(ValueError, match="were checked"):
        train(tiny_config(), tmp_path / "new", progress=False, self_check=True)
    assert going_on.takes_a_step(run, tiny_config(**LONGER))
    last_again = tiny_config(**{"train.skip_batches": ((10, 1),)})
    assert going_on.takes_a_step(run, last_again), "it goes back to step 9"
    (run / "evaluation.json").unlink()
    assert not going_on.takes_a_step(run, tiny_config())
    shutil.rmtree(run / "checkpoints/10")
    assert going_on.takes_a_step(run, tiny_config())


@pytest.mark.parametrize(
    ("there", "here", "step"),
    [
        ({}, LONGER, 11),
        (LONGER, {}, 11),
        ({"train.schedule_steps": 10}, {}, 11),
        ({}, SPIKE, 7),
        (SPIKE, {**SPIKE, "train.skip_batches": ((7, 3), (9, 1))}, 9),
        (SPIKE, {**SPIKE, "optimizer.rate_changes": ((7, 0.5),)}, 8),
    ],
)
def test_the_first_step_that_changes(tiny_config, there, here, step):
    assert going_on.first_changed(tiny_config(**there), tiny_config(**here)) == step


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.skip_batches", ((3, 1), (3, 1)), "growing steps, from 1 to steps=10"),
        ("train.skip_batches", ((11, 1),), "growing steps, from 1 to steps=10"),
        ("train.skip_batches", ((3, 0),), "number > 0"),
        ("train.skip_batches", ((),), "must be pairs"),
        ("train.skip_batches", (3, 1), "must be a tuple"),
        ("optimizer.rate_changes", ((2.5, 1.0),), "growing whole steps"),
        ("optimizer.rate_changes", ((2, 0.0),), "multiple > 0"),
        ("optimizer.rate_changes", ((11, 0.5),), "up to train.steps=10"),
        ("train.schedule_steps", 0, "> 0"),
        ("train.stages.optimizer.rate_changes", (((1, 0.5),), ()), "cannot change during a run"),
    ],
)
def test_impossible_changes_are_refused(tiny_config, key, value, says):
    with pytest.raises(ValueError, match=says) as error:
        replace(tiny_config(**{"train.stages.share": (0.5, 0.5)}), **{key: value})
    assert "\n" not in str(error.value)
