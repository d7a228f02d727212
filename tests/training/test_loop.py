"""A run from beginning to end: what it leaves behind, and that interruptions change nothing."""

import json
import math
import os
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import differences
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import KERNELS, read_rows
from dsmoe_jax.runs.workdir import read_config, read_evaluation
from dsmoe_jax.training import loop, run_log
from dsmoe_jax.training.interrupt import Stopped
from dsmoe_jax.training.loop import NonFinite, train
from dsmoe_jax.training.optimizer import SCHEDULES
from tests.parallel.endurance import preempt
from tests.tools.forked import Process, run_all
from tests.tools.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("shared_steps")
# Rows of the same step of two runs differ in how fast they were, and in nothing else; the first row
# after a start names the kernels.
SPEEDS = {
    *("tokens_per_second", "flops_per_second", "flops_utilization", "overhead", "step_seconds"),
    *("host_data_seconds", "host_work_seconds"),
}
NOT_COMPARED = {*SPEEDS, KERNELS}


def numbers(workdir):
    """The rows of a run without its speeds."""
    return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in read_rows(workdir)]


def parameters(workdir):
    """The arrays of the newest checkpoint's model."""
    run = load_run(workdir)
    return run.step, [np.asarray(x) for x in jax.tree.leaves(nnx.state(run.model))]


def assert_same_run(workdir, undisturbed):
    """Every number of every row, and every bit of the final parameters."""
    assert numbers(workdir) == numbers(undisturbed)
    (step_a, a), (step_b, b) = parameters(workdir), parameters(undisturbed)
    assert step_a == step_b
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    trained = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert trained == list(range(1, 11)), "each step is in the file once"


class TestWhatARunLeaves:
    def test_workdir(self, finished_run, tiny_config):
        workdir, result = finished_run
        assert not differences(read_config(workdir), tiny_config())
        assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["10", "9"]
        assert list((workdir / "tensorboard").glob("events.*"))
        assert json.loads((workdir / "evaluation.json").read_text()) == {
            "step": 10, **{k: v for k, v in result.evaluation.items() if k != "step"}
        }  # fmt: skip

    def test_rows(self, finished_run, tiny_config):
        rows, config = read_rows(finished_run[0]), tiny_config()
        assert [row["step"] for row in rows] == list(range(1, 11))
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.3, "it learns"
        assert math.isclose(rows[0]["loss"], math.log(512), rel_tol=0.05), "starts near ln V"
        assignments = config.train.global_batch_size * 64 * 2
        for row in rows:
            assert row["tokens"] == row["step"] * config.tokens_per_step
            assert np.shape(row["load"]) == (2, 4)
            # A short last record of a domain is filled with padding, which counts nowhere.
            assert all(assignments * 0.7 < sum(layer) <= assignments for layer in row["load"])
            assert all(0 < h <= math.log(4) + 1e-6 for h in row["router_entropy"])
            assert row["dropped"] == [0, 0]
            assert all(
                0.25 < top < total <= 1
                for top, total in zip(row["router_top_gate"], row["router_gate_sum"], strict=True)
            )
            assert all(0 <= g <= 0.75 for g in row["gini"])
            weighted = 0.01 * sum(row["expert_balance"]) + 0.001 * sum(row["router_z"])
            assert math.isclose(row["total_loss"], row["loss"] + weighted, rel_tol=1e-5)
            assert row["tokens_per_second"] > 0
            assert row["flops_per_second"] > 0
            assert 0 <= row["overhead"] <= 1, "1: the steps were over before anybody looked"
        assert [row["step"] for row in rows if "validation_loss" in row] == [5, 10]

    def test_the_first_row_names_the_kernels(self, finished_run):
        first, *rest = read_rows(finished_run[0])
        assert first[KERNELS] == {"attention": "xla", "experts": "loop", "rows": "native"}
        assert not any(KERNELS in row for row in rest)

    def test_floats_are_printed_in_full(self, finished_run):
        row = json.loads((finished_run[0] / "metrics.jsonl").read_text().splitlines()[0])
        assert float(np.float32(row["loss"])) == row["loss"]

    def test_the_evaluate_command_finds_the_same(self, finished_run):
        workdir, result = finished_run
        as_the_run = "--batch_size=4", "--max_batches=2"
        (done,) = run_all([("evaluate", f"--workdir={workdir}", *as_the_run)])
        assert done.code == 0, done.err
        _, *lines = done.out.splitlines()
        rows = {**result.evaluation["domains"], "all": result.evaluation}
        for line, (name, row) in zip(lines[: len(rows)], rows.items(), strict=True):
            numbers = f"{row['tokens']} {row['loss']:.4f} {row['bits_per_byte']:.4f}"
            assert line.split() == [name, *numbers.split()]

    def test_a_finished_run_is_not_computed_again(self, finished_run, tiny_config, monkeypatch):
        workdir, result = finished_run
        before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.json*") if p.is_file()}
        before.pop(workdir / "config.json")
        monkeypatch.setattr(loop, "open_corpus", None)  # cannot get further than this
        again = train(tiny_config(), workdir, progress=False)
        assert again.evaluation["loss"] == result.evaluation["loss"]
        assert again.metrics == result.metrics
        assert {p: p.stat().st_mtime_ns for p in before} == before


class TestInterruptions:
    def test_sigterm_saves_and_the_same_call_goes_on(
        self, finished_run, tiny_config, tmp_path, monkeypatch, capsys
    ):
        original, seen = run_log.training_row, []

        def row_then_signal(*arguments):
            seen.append(1)
            if len(seen) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        monkeypatch.setattr(run_log, "training_row", row_then_signal)
        with pytest.raises(Stopped) as stopped:
            train(tiny_config(), tmp_path / "run")
        assert stopped.value.code == 143
        assert "stopped by SIGTERM after step 5" in capsys.readouterr().err
        assert (tmp_path / "run/checkpoints/5").is_dir()
        result = train(tiny_config(), tmp_path / "run", progress=False)
        assert result.resumed_from == 5
        assert_same_run(tmp_path / "run", finished_run[0])

    def test_preempted_again_and_again(self, finished_run, tiny_config, tmp_path):
        """A thousand times: `python -m tests.parallel.endurance --preemptions=1000`."""
        moment = random.Random(0)
        stops = []
        preempt(tiny_config(), tmp_path / "run", 3, moment, lambda: stops.append(1))
        assert len(stops) == 3
        assert_same_run(tmp_path / "run", finished_run[0])

    def test_ctrl_c_while_evaluating(self, finished_run, tiny_config, tmp_path, monkeypatch):
        original = HeldOut.measure

        def interrupted(self, *args):
            os.kill(os.getpid(), signal.SIGINT)
            return original(self, *args)

        monkeypatch.setattr(HeldOut, "measure", interrupted)
        with pytest.raises(Stopped) as stopped:
            train(tiny_config(), tmp_path / "run", progress=False)
        monkeypatch.undo()
        assert stopped.value.code == 130
        assert "validation_loss" not in read_rows(tmp_path / "run")[-1]
        train(tiny_config(), tmp_path / "run", progress=False)
        assert_same_run(tmp_path / "run", finished_run[0])

    def test_killed_just_before_the_end(self, finished_run, tiny_config, tmp_path):
        """All is written but the evaluation: it is made again, its row is not written twice."""
        workdir = shutil.copytree(finished_run[0], tmp_path / "run")
        (workdir / "evaluation.json").unlink()
        before = (workdir / "metrics.jsonl").read_bytes()
        assert train(tiny_config(), workdir, progress=False).resumed_from == 10
        assert (workdir / "metrics.jsonl").read_bytes() == before
        assert read_evaluation(workdir) == read_evaluation(finished_run[0])

    def test_killed_at_random_moments(self, finished_run, tiny_config, tmp_path):
        """`kill -9` and SIGTERM from outside; then the same command, until it is done."""
        seed = int.from_bytes(os.urandom(2), "big")
        moment, workdir = random.Random(seed), tmp_path / "run"
        script = tmp_path / "tiny.py"
        script.write_text(CONFIG_FILE.format(config=tiny_config()))
        command = "train", f"--config={script}", f"--workdir={workdir}"
        rows = lambda: len(read_rows(workdir)) if workdir.exists() else 0  # noqa: E731
        whens = [
            lambda child, _: time.sleep(moment.uniform(0, 4)),  # compilation, maybe steps
            lambda child, before: wait(child, lambda: rows() > before + moment.randint(0, 2)),
            lambda child, _: wait(child, lambda: any(workdir.glob("checkpoints/*tmp*"))),
        ]
        for kind, when in zip((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), whens, strict=True):
            before, child = rows(), Process(command)
            when(child, before)
            if child.result(wait=False) is None:
                os.kill(child.pid, kind)
            ended = child.result()
            assert ended.code in (-9, 143, 0), (seed, ended.err)
        (done,) = run_all([command])
        assert done.code == 0, (seed, done.err)
        assert "Traceback" not in done.err
        assert_same_run(workdir, finished_run[0])

    def test_non_finite_names_step_metric_and_checkpoint(self, tiny_config, tmp_path, monkeypatch):
        monkeypatch.setitem(SCHEDULES, "explodes", lambda config, steps: lambda step: math.nan)
        config = tiny_config(**{"optimizer.schedule": "explodes", "train.checkpoint_every": 1})
        with pytest.raises(NonFinite) as caught:
            train(config, tmp_path / "run", progress=False)
        message = str(caught.value)
        assert re.match(r"step 2: (loss|grad_norm)=nan; stopped\.", message)
        assert "Last good checkpoint: step 1" in message
        assert "\n" not in message
        assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["1"]
        assert [row["step"] for row in read_rows(tmp_path / "run")] == [1]


CONFIG_FILE = """
from dsmoe_jax.config import *
def get_config():
    return to_config_dict({config!r})
"""


def wait(child, condition):
    """Until the condition holds or the child has ended."""
    end = time.monotonic() + PATIENCE
    while not condition() and child.result(wait=False) is None:
        assert time.monotonic() < end
        time.sleep(0.002)
