"""The status of directories of every kind: runs, damaged ones, and what is no run."""

import json
import os
import shutil
import signal

import jax
import pytest

from dsmoe_jax.config import to_config_dict
from dsmoe_jax.runs import events, troubles
from dsmoe_jax.runs.events import Journal, read_events
from dsmoe_jax.runs.status import read_status
from dsmoe_jax.runs.workdir import claim
from dsmoe_jax.training import run_log, trainer
from dsmoe_jax.training.interrupt import Stopped
from dsmoe_jax.training.loop import NonFinite, train
from tests.tools.forked import assert_refused, run_all


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run of ten steps, as on a machine that nothing else uses."""
    copy = shutil.copytree(finished_run[0], tmp_path / "run")
    rows = map(json.loads, (copy / "metrics.jsonl").read_text().splitlines())
    lines = [json.dumps(row | {"overhead": 0.0}) + "\n" for row in rows]
    (copy / "metrics.jsonl").write_text("".join(lines))
    return copy


def unfinished(run, *kinds):
    """Forgets the end of a run; its last events are these."""
    (run / "evaluation.json").unlink()
    (run / events.EVENTS_FILE).unlink()
    journal = Journal(run)
    journal.step = 10
    for kind in kinds:
        journal.add(kind, signal="SIGTERM", error="the disk is full")
    return run


def test_a_finished_run(run, tiny_config, finished_run):
    status = read_status(run)
    assert (status.state, status.step, status.steps, status.troubles) == ("finished", 10, 10, ())
    assert status.tokens == status.all_tokens == 10 * tiny_config().tokens_per_step
    assert status.validation_loss == finished_run[1].evaluation["loss"]
    assert status.loss == finished_run[1].metrics["loss"]
    assert [checkpoint.step for checkpoint in status.checkpoints] == [9, 10]
    assert status.seconds_left is None
    kinds = [event["event"] for event in status.events]
    assert kinds[0] == events.START
    assert kinds[-1] == events.END
    assert kinds.count(events.CHECKPOINT) == 4, "after steps 3, 6, 9 and 10"


@pytest.mark.parametrize(
    ("kinds", "state", "says"),
    [
        ((events.START,), "dead", "no process holds it"),
        ((events.START, events.STOPPED), "stopped", "by SIGTERM after step 10"),
        ((events.START, events.FAILED), "failed", "the disk is full"),
    ],
)
def test_a_run_without_a_process(run, kinds, state, says):
    status = read_status(unfinished(run, *kinds))
    assert status.state == state
    assert says in status.says


def test_a_running_run_and_its_time(run, tiny_config):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")
    shutil.rmtree(run / "checkpoints")
    with claim(unfinished(run, events.START), tiny_config()):
        status = read_status(run)
    assert (status.state, status.says) == ("running", f"by process {os.getpid()}")
    rows = [json.loads(line) for line in lines[:5]]
    speeds = sorted(row["tokens_per_second"] for row in rows)
    left = tiny_config().tokens_per_step * 5 / speeds[2]
    assert status.seconds_left == pytest.approx(left), "five steps at the median speed"
    assert read_status(run).state == "dead"


def test_looking_keeps_no_trainer_out(run, tiny_config):
    """A trainer that starts while `status` holds its lock waits a moment."""
    import fcntl
    import threading
    import time

    with open(run / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        threading.Thread(
            target=lambda: (time.sleep(0.05), fcntl.flock(lock, fcntl.LOCK_UN))
        ).start()
        with claim(run, tiny_config()):
            pass


def test_no_device_is_touched(run, monkeypatch):
    """Also where keys were added to the config since, which other readers of it speak of."""
    tree = json.loads((run / "config.json").read_text())
    del tree["mesh"]
    (run / "config.json").write_text(json.dumps(tree))
    for name in ("devices", "local_devices", "process_index", "process_count"):
        monkeypatch.setattr(jax, name, None)
    assert read_status(run).state == "finished"


def test_damage_is_named_and_the_rest_is_said(run):
    largest = max((run / "checkpoints/10/model").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    shutil.rmtree(run / "checkpoints/9/training")
    with open(run / "metrics.jsonl", "a") as file:
        file.write("{]\n")
    (run / "evaluation.json").write_text("[]")
    status = read_status(run)
    assert (status.state, status.steps, status.step) == ("damaged", 10, 0)
    for part in ("metrics.jsonl: line 13", "10: model/", "9: training/", "evaluation.json"):
        assert any(part in trouble for trouble in status.troubles), part


def test_other_directories(tmp_path, run, tiny_config):
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.json").write_text(json.dumps(to_config_dict(tiny_config()).to_dict()))
    broken = shutil.copytree(fresh, tmp_path / "broken")
    (broken / "config.json").write_text('{"model": 3}')
    lost = shutil.copytree(run, tmp_path / "lost")
    (lost / "config.json").unlink()
    model = shutil.copytree(run, tmp_path / "model")
    for name in ("metrics.jsonl", "evaluation.json", events.EVENTS_FILE):
        (model / name).unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("buy chips")
    wanted = {
        "fresh": ("fresh", "not made a step"),
        "broken": ("damaged", "config.json is not the config of a run of this version: "),
        "lost": ("damaged", "config.json is missing"),
        "model": ("model", "no training"),
        "empty": ("empty", "may begin here"),
        "notes": ("foreign", "holds 'todo.txt' but no config.json"),
        ".": ("foreign", "holds 4 workdirs: broken, fresh, model, run"),
    }
    for name, (state, says) in wanted.items():
        status = read_status(tmp_path / name)
        assert (name, status.state) == (name, state)
        assert says in status.says


def test_what_went_wrong():
    row = {"loss": 1.0, "grad_norm": 1.0, "load": [[8, 0], [4, 4]], "dropped": [2, 0]}
    rows = [{**row, "step": step, "overhead": 0.2} for step in (1, 2)]
    rows.append({**rows[0], "step": 3, "grad_norm": float("nan"), "dropped": [0, 0]})
    log = [
        {"event": events.START},
        {"event": events.RESUME},
        {"event": events.STOPPED},
        {"event": events.RESUME},
        {"event": events.SPIKE, "action": "skip", "spike_step": 2},
        {"event": events.FAILED, "step": 3, "error": "no room"},
    ]
    assert troubles.find(rows, log) == [
        "failed after step 3: no room",
        "spikes: 1 x skip; the last in step 2",
        "loss or gradient not finite in 1 rows, last in step 3",
        "killed without a word once, and started again",
        "stopped by a signal once",
        "dropped 8.33% of the assignments in the logged steps, 0.00% in the last",
        "experts without a token in the last 3 rows: 1 in MoE layer 1",
        "the device has no step for 20% of the time: its host is late",
    ]
    steady = [
        {"tokens": 100, "tokens_per_second": 10.0},
        {"tokens": 200, "tokens_per_second": 10.0},
    ]
    assert troubles.silent(steady, 99) == []
    assert troubles.silent(steady, 101) == [
        "silent for 2 min, where a row came every 10 s: it hangs?"
    ]


def test_a_run_notes_its_events(tiny_config, tmp_path, monkeypatch):
    """Stopped, failed and ended; a line that a kill has cut spoils no other."""
    config = tiny_config(
        **{"train.steps": 6, "train.eval_every": None, "train.checkpoint_every": 2}
    )
    original = run_log.training_row

    def stops(metrics, model):
        if len(read_events(tmp_path)) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(metrics, model)

    monkeypatch.setattr(run_log, "training_row", stops)
    with pytest.raises(Stopped):
        train(config, tmp_path, progress=False)
    monkeypatch.undo()
    with open(tmp_path / events.EVENTS_FILE, "a") as file:
        file.write('{"time": 1, "ev')
    monkeypatch.setattr(trainer, "first_non_finite", lambda _: ("loss", float("nan")))
    with pytest.raises(NonFinite):
        train(config, tmp_path, progress=False)
    monkeypatch.undo()
    train(config, tmp_path, progress=False)
    found = [(event["event"], event["step"]) for event in read_events(tmp_path)]
    assert found == [
        ("start", 0), ("checkpoint", 2), ("stopped", 2),
        ("resume", 2), ("failed", 2),
        ("resume", 2), ("checkpoint", 4), ("checkpoint", 6), ("evaluation", 6), ("end", 6),
    ]  # fmt: skip
    status = read_status(tmp_path)
    assert status.state == "finished"
    assert status.events[3]["hosts"] == [os.uname().nodename]
    assert len(status.troubles) == 2


def test_the_command(run, tmp_path):
    (tmp_path / "empty").mkdir()
    missing = str(tmp_path / "missing")
    shown, as_json, none, one_missing = run_all(
        [
            ("status", str(run), f"--workdir={tmp_path / 'empty'}"),
            ("status", str(run), "--json"),
            ("status",),
            ("status", missing, str(run)),
        ]
    )
    assert (shown.code, shown.err) == (0, "")
    first, second = shown.out.split("\n\n")
    assert second.startswith(f"{run}: finished; step 10 of 10 (100%)\n")
    assert first == f"{tmp_path / 'empty'}: empty; a new run may begin here"
    (found,) = json.loads(as_json.out)
    assert (found["state"], found["checkpoints"][-1]["step"]) == ("finished", 10)
    assert_refused(none, "--workdir: missing; for example status runs/dsmoe")
    assert one_missing.code == 2
    assert f"--workdir={missing}: no such directory" in one_missing.err
    assert str(run) in one_missing.out, "the others are shown"
