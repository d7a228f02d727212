"""Staged training: what a stage changes, the stream of data, stopping at and around a border."""

import itertools
import os
import signal
from unittest import mock

import numpy as np
import pytest

from dsmoe_jax.config import (
    Config,
    from_config_dict,
    replace,
    stage_of,
    stages_of,
    to_config_dict,
    tokens_after,
)
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.data.pipeline import train_batches
from dsmoe_jax.model import size
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training import run_log
from dsmoe_jax.training.interrupt import Stopped
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.stages import StageRun
from dsmoe_jax.training.step import make_train_step
from tests.tools.forked import run_script
from tests.training.test_loop import assert_same_run

pytestmark = pytest.mark.usefixtures("shared_steps")
S = 64
KILLED = """
import os, signal, sys
from dsmoe_jax.config import *
from dsmoe_jax.training import loop, run_log

def row_or_kill(*arguments, original=run_log.training_row, rows=[]):
    rows.append(1)
    if len(rows) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

run_log.training_row = row_or_kill
loop.train({config!r}, sys.argv[1], progress=False)
"""
STAGES = {  # steps 1-3, 4-7, 8-10
    "train.stages.share": (0.3, 0.4, 0.3),
    "train.stages.train.global_batch_size": (4, 2, 4),
    "train.stages.train.accumulation_steps": (1, 1, 2),
    "train.stages.optimizer.peak_learning_rate": (0.01, 0.003, 0.001),
    "train.stages.model.moe.num_experts_per_tok": (1, 2, 3),
    "train.stages.model.moe.balance.router_z.factor": (0.0, 0.001, 0.01),
    "model.moe.router.bias_update_speed": 0.02,
    "model.moe.router.bias_update_schedule": ((0.1, 1.0), (0.1, 0.5)),
    "train.stages.model.moe.router.bias_update_speed": (0.02, 0.01, 0.0),
}


def test_a_stage_is_the_config_with_its_values():
    config = replace(Config(), **{**STAGES, "train.steps": 10})
    assert from_config_dict(to_config_dict(config)) == config
    stages = stages_of(config)
    assert [(s.first, s.end, s.sequences) for s in stages] == [(0, 3, 0), (3, 7, 12), (7, 10, 20)]
    assert stages[1].config == replace(
        Config(),
        **{
            "train.steps": 10, "train.global_batch_size": 2, "train.accumulation_steps": 1,
            "optimizer.peak_learning_rate": 0.003, "model.moe.num_experts_per_tok": 2,
            "model.moe.balance.router_z.factor": 0.001,
            "model.moe.router.bias_update_speed": 0.01,
            "model.moe.router.bias_update_schedule": ((0.1, 1.0), (0.1, 0.5)),
        },
    )  # fmt: skip
    assert [stage_of(config, step).first for step in (0, 1, 3, 4, 7, 8, 10)] == [
        0,
        0,
        0,
        3,
        3,
        7,
        7,
    ]
    in_sequences = [0, 4, 8, 12, 14, 16, 18, 20, 24, 28, 32]
    assert [tokens_after(config, step) for step in range(11)] == [n * 2048 for n in in_sequences]


TOP_K = "model.moe.num_experts_per_tok"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"share": (0.5, 0.4)}, r"train.stages.share=\(0.5, 0.4\): must be shares > 0 .* sum to 1"),
        ({"share": (1.5, -0.5)}, r"train.stages.share=.*: must be shares > 0 .* that sum to 1"),
        ({"share": (0.5, 0.5), "train.global_batch_size": (4,)}, r"_size=.* have 2 entries"),
        ({TOP_K: (2,)}, r"train.stages.share=\(\): must be shares > 0"),
        ({"share": (0.99, 0.01)}, r"share=\(0.99, 0.01\): leaves stage 1 without a step"),
        (
            {"share": (0.5, 0.5), TOP_K: (7, 64)},
            r"train.stages: stage 1: model.moe.num_experts_per_tok=64: .* n_routed_experts=63",
        ),
        (
            {"share": (0.5, 0.5), "train.accumulation_steps": (1, 3)},
            r"stage 1: train.accumulation_steps=3: must divide global_batch_size=2048",
        ),
        ({"share": (0.5, 0.5), "data.sequence_length": (8, 9)}, "length cannot change during"),
        ({"share": (0.5, 0.5), "train.log_every": (8, 9)}, "log_every cannot change during a run"),
    ],
)
def test_impossible_stages_are_refused(overrides, says):
    keys = {f"train.stages.{key}": value for key, value in overrides.items()}
    with pytest.raises(ValueError, match=says):
        replace(Config(), **{"train.steps": 10, **keys})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model.hidden_size": (32, 64)},
         r"stages\.model\.hidden_size=\(32, 64\): changes the shape of parameters/embedding"),
        ({"model.moe.router.bias_update_speed": (None, 0.1), TOP_K: (2, 1)},
         r"bias_update_speed=\(None, 0.1\): changes the shape of router variables/.*/bias_E from"
         r" that of model\.moe\.router\.bias_update_speed=None outside the stages"),
        ({"model.moe.n_routed_experts": (4, 8), TOP_K: (2, 5)},
         r"model\.moe\.n_routed_experts=\(4, 8\): changes .* cannot change during a run$"),
        ({"model.moe.router.name": ("topk", "hashed")}, r"router\.name='hashed': must be one of"),
    ],
)  # fmt: skip
def test_stages_of_another_shape_are_refused(tiny_config, tmp_path, overrides, says):
    """Before anything is written; the key that is to blame is named."""
    keys = {f"train.stages.{key}": value for key, value in overrides.items()}
    config = tiny_config(**keys, **{"train.stages.share": (0.5, 0.5)})
    with pytest.raises(ValueError, match=says) as caught:
        train(config, tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_each_stage_compiles_once(staged):
    """One trace a stage, over rows of the log, an evaluation and checkpoints in its middle."""
    config, workdir, traced = staged
    rows = read_rows(workdir)
    stage = next(s for s in stages_of(config) if s.first < 5 < s.end)
    inside = range(stage.first + 1, stage.end)
    assert {row["step"] for row in rows if "loss" in row} >= {*inside}
    assert any("validation_loss" in row for row in rows if row["step"] in inside)
    assert any(step % config.train.checkpoint_every == 0 for step in inside)
    assert traced == [1, 2, 3]


def test_all_stages_read_one_stream(tiny_corpus):
    """Batches of 8, then of 4, then of 16: the records of batches of 1, none twice, none lost."""

    def rows(size, n_batches, start=(0, 0), position=None):
        batches = train_batches(tiny_corpus, S, size, 3, start=start)
        if position is not None:
            batches.set_state(position)
        found = [b["tokens_BS"] for b in itertools.islice(batches, n_batches)]
        return list(np.concatenate(found)), batches.get_state()

    first, position = rows(8, 3)
    second, position = rows(4, 5, (3, 24), position)
    third, _ = rows(16, 2, (8, 44), position)
    want, _ = rows(1, 76)
    np.testing.assert_array_equal(first + second + third, want)


def test_a_run_goes_on_in_the_stream_at_every_border(tiny_config, tiny_corpus):
    """The stages read the records of batches of 1 in order, none twice, none lost."""
    found, position = [], None
    config = tiny_config(**STAGES)
    for stage in stages_of(config):
        run = StageRun(stage, open_corpus(config.data), position)
        for step in range(stage.first + 1, stage.end + 1):
            found += list(run.next_batch(step)["tokens_BS"])
        position = run.position()
    single = train_batches(tiny_corpus, S, 1, config.train.seed)
    want = [batch["tokens_BS"][0] for batch in itertools.islice(single, 32)]
    np.testing.assert_array_equal(found, want)


@pytest.fixture(scope="module")
def staged(tiny_config, tmp_path_factory, shared_steps):
    """Config and workdir of a staged run that nothing disturbed; K of each traced step."""
    config, workdir = tiny_config(**STAGES), tmp_path_factory.mktemp("runs") / "staged"
    traced, original = [], make_train_step

    def counting(config, *others):
        train_step = original(config, *others)

        def counted(*arguments):
            traced.append(config.model.moe.num_experts_per_tok)
            return train_step(*arguments)

        return counted

    shared_steps.clear()  # another test may have made those of this config, which do not count
    with mock.patch("dsmoe_jax.training.step.make_train_step", counting):
        train(config, workdir, progress=False)
    return config, workdir, traced


def test_rows_show_the_stages(staged):
    config, workdir, _ = staged
    for row in read_rows(workdir):
        step, stage = row["step"], stage_of(config, row["step"]).config
        assert row["tokens"] == tokens_after(config, step)
        sequences, k = stage.train.global_batch_size, stage.model.moe.num_experts_per_tok
        # A short last record of a domain is filled with padding, which counts nowhere.
        assert all(0.7 < sum(load) / (sequences * S * k) <= 1 for load in row["load"]), step
        warmup = min(step / config.optimizer.warmup_steps, 1)
        drops = 0.316 ** ((step > 8) + (step > 9))
        rate = stage.optimizer.peak_learning_rate * warmup * drops
        np.testing.assert_allclose(row["learning_rate"], rate, rtol=1e-6)
        weighted = 0.01 * sum(row["expert_balance"])
        weighted += stage.model.moe.balance["router_z"].factor * sum(row["router_z"])
        np.testing.assert_allclose(row["total_loss"], row["loss"] + weighted, rtol=1e-5)
        flops = row["flops_per_second"] / row["tokens_per_second"]
        np.testing.assert_allclose(flops, size.train_flops_per_token(stage), rtol=1e-9)
    assert load_run(workdir).model.config.moe.num_experts_per_tok == 3


def test_the_bias_moves_at_the_speed_of_each_stage(staged):
    """By schedule and by stage: 0.02 in the first step, then a half of it, and nothing at last.

    The interrupted runs below are this one bit for bit, so the bias goes on where it was.
    """
    config, workdir, _ = staged
    rows = [row for row in read_rows(workdir) if "load" in row]
    moved = np.zeros(np.shape(rows[0]["load"]))
    for row in rows:
        load_LE = np.array(row["load"])
        speed = stage_of(config, row["step"]).config.model.moe.router.bias_update_speed
        speed *= 1.0 if row["step"] == 1 else 0.5
        moved += speed * np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
    biases = [
        load_run(workdir, step).model.layers.moe.bias_E[...] for step in (9, 10)
    ]  # both of the last stage
    np.testing.assert_allclose(biases[0], moved, atol=1e-7)
    np.testing.assert_array_equal(biases[0], biases[1])
    assert np.abs(moved).max() > 0.02


def test_stopping_at_and_around_a_border(staged, tmp_path, monkeypatch):
    """At the border and after it, in one run: bit for bit as if nothing had been."""
    config, undisturbed, _ = staged
    original, stop_at = run_log.training_row, [1]

    def row_then_signal(*arguments):
        if stop_at and len(read_rows(tmp_path / "run")) + 1 == stop_at[0]:
            stop_at.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(run_log, "training_row", row_then_signal)
    for row, step in ((3, 3), (4, 5)):  # of the row written, and of the stop
        stop_at[:] = [row]
        with pytest.raises(Stopped):
            train(config, tmp_path / "run", progress=False)
        assert (tmp_path / f"run/checkpoints/{step}").is_dir()
    train(config, tmp_path / "run", progress=False)
    assert_same_run(tmp_path / "run", undisturbed)


def test_killed_behind_a_border(staged, tmp_path):
    """`kill -9` in the first step after a border; the last checkpoint lies before the border."""
    config, undisturbed, _ = staged
    config = replace(config, **{"train.checkpoint_every": 2})
    script, workdir = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED.format(config=config))
    child = run_script(script, str(workdir), "8")
    assert child.code == -signal.SIGKILL, child.err
    assert read_rows(workdir)[-1]["step"] == 7
    result = train(config, workdir, progress=False)
    assert result.resumed_from == 6
    assert_same_run(workdir, undisturbed)
