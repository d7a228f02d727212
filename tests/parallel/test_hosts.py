"""Several processes train one model: killed, frozen, stopped and restarted, or started wrongly."""

import functools
import json
import os
import random
import signal
import time
from unittest import mock

import jax
import numpy as np
import pytest

from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.status import read_status
from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import place_of
from tests.parallel.endurance import fill_disk
from tests.parallel.trainers import Launcher, Run
from tests.tools.buckets import emulator
from tests.tools.patience import PATIENCE

# The others must end by themselves, by the heartbeat that we set: within eight of them, for a busy
# machine, where a machine without it would wait for ever.
IN_TIME = 8 * hosts.HEARTBEAT_SECONDS
NUMBERS = ("step", "loss", "total_loss", "grad_norm", "load", "validation_loss")


@pytest.fixture(scope="module")
def launcher(tiny_corpus, tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("hosts"), tiny_corpus)
    yield launcher
    launcher.clean_up()


@pytest.fixture(scope="module")
def undisturbed(launcher, tmp_path_factory):
    """A run of one process with all devices that nothing disturbed; it records its routing."""
    run = Run(launcher, tmp_path_factory.mktemp("one") / "run", 1)
    codes, said = run.end()
    assert codes == [0], said
    return run


@pytest.fixture
def moment():
    """Random, and said when the test fails."""
    seed = int.from_bytes(os.urandom(2), "big")
    print(f"{seed=}")
    return random.Random(seed)


def numbers(run):
    return [{k: row[k] for k in NUMBERS if k in row} for row in read_rows(run.workdir)]


def others_end(run, victim):
    """All but one of the trainers end by themselves, with an error, in time."""
    end = time.monotonic() + IN_TIME
    for trainer in run.trainers:
        if trainer is not run.trainers[victim]:
            code, said = trainer.end(max(0, end - time.monotonic()))
            # A launcher starts them again: not 2, which is bad input.
            assert code not in (0, 2, None), (victim, said)


def test_two_processes_stopped_and_frozen_at_random_do_what_one_does(
    launcher, tmp_path, moment, undisturbed
):
    """SIGTERM to one stops both after the same step; SIGSTOP of one ends the other in time.

    The frozen one ends when it wakes up.  Then the same commands go on, and the losses are bit for
    bit those of one process.
    """
    run = Run(launcher, tmp_path / "run", 2)
    run.wait_for_row(moment.randint(1, 4))
    run.trainers[1].send(signal.SIGTERM)
    codes, said = run.end()
    assert codes == [143, 143], said
    stopped = len(read_rows(run.workdir))
    assert f"stopped by SIGTERM after step {stopped}" in said[0]
    assert (run.workdir / f"checkpoints/{stopped}").is_dir()

    run, victim = Run(launcher, run.workdir, 2), moment.randint(0, 1)
    run.wait_for_row(stopped + moment.randint(1, 4))
    run.trainers[victim].send(signal.SIGSTOP)
    others_end(run, victim)
    run.trainers[victim].send(signal.SIGCONT)
    code, said = run.trainers[victim].end(PATIENCE)
    assert code not in (0, None), (victim, said)

    run = Run(launcher, run.workdir, 2, self_check=True)
    codes, said = run.end()
    assert codes == [0, 0], said
    assert "self-check: router topk, dispatcher local, experts loop in float32 on fsdp 2" in said[0]
    assert numbers(run) == numbers(undisturbed)
    assert_same_routing(run.workdir, undisturbed.workdir)
    assert_same_tables(run.workdir, undisturbed.workdir)
    assert_written_by_the_right_ones(run.workdir)


def test_four_processes_of_which_one_is_killed_where_two_go_on(
    launcher, tmp_path, moment, undisturbed
):
    """SIGKILL of one ends all others in time; the four are two slices of two.

    Two processes go on where four were: on half of the devices, without expert parallelism, in
    twice as many micro-batches, with the same losses to float32 rounding.
    """
    sliced = ("mesh.slices=2", "mesh.data=2", "mesh.fsdp=1")
    run, victim = Run(launcher, tmp_path / "run", 4, *sliced), moment.randint(0, 3)
    run.wait_for_row(moment.randint(3, 9))
    run.wait_for_checkpoint()
    run.trainers[victim].send(signal.SIGKILL)
    others_end(run, victim)

    run = Run(launcher, run.workdir, 2, "train.accumulation_steps=2")
    codes, said = run.end()
    assert codes == [0, 0], said
    assert "going on from step" in said[0]
    losses, wanted = ([row["loss"] for row in rows] for rows in map(numbers, (run, undisturbed)))
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_a_disk_that_is_full_on_one_of_two_hosts_ends_both(launcher, tmp_path):
    """The other one, which has written its part, does not wait for long."""
    run = Run(launcher, tmp_path / "run", 2, "train.checkpoint_every=1")
    run.wait_for_checkpoint()
    fill_disk(run.trainers[1])
    end = time.monotonic() + IN_TIME
    for trainer in run.trainers:
        code, said = trainer.end(max(0, end - time.monotonic()))
        assert code not in (0, None), said
    assert not (run.workdir / "evaluation.json").exists()


def in_bucket(environment):
    """Before a process trains: it goes to a bucket."""
    os.environ.update(environment)


def writes_another(workdir):
    """Whether there is a whole checkpoint, and another is being written."""
    steps = {name.split("/")[0] for name in files.sizes(workdir / "checkpoints")}
    whole = [step for step in steps if files.is_whole(workdir / "checkpoints" / step)]
    return 0 < len(whole) < len(steps)


def test_two_processes_in_a_bucket_killed_while_they_write(
    launcher, undisturbed, tiny_corpus, tmp_path
):
    """The same command ends with the numbers of a run on the disk, bit for bit."""
    with emulator() as bucket:
        for path in tiny_corpus.iterdir():
            there = place_of("corpus", f"{bucket.address}/corpus/{path.name}")
            files.upload(there, path.read_bytes())
        keys = "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"
        environment = {key: os.environ[key] for key in keys} | {"DSMOE_CACHE": str(tmp_path)}
        before = dict.fromkeys(range(2), functools.partial(in_bucket, environment))
        changes = f"data.corpus={bucket.address}/corpus", "train.checkpoint_every=1"
        workdir = place_of("--workdir", f"{bucket.address}/run")
        run = Run(launcher, workdir, 2, *changes, before=before)
        run.wait_until(lambda: writes_another(workdir))
        for trainer in run.trainers:
            trainer.send(signal.SIGKILL)
        codes, said = run.end()
        assert codes == [-signal.SIGKILL] * 2, said

        run = Run(launcher, workdir, 2, *changes, before=before)
        codes, said = run.end()
        assert codes == [0, 0], said
        assert "going on from step" in said[0]
        assert numbers(run) == numbers(undisturbed)
        shards = {p.name for p in (workdir / "checkpoints/16/model").glob("ocdbt.process_*")}
        assert shards == {"ocdbt.process_0", "ocdbt.process_1"}


def slow_data():
    """Batches take 0.4 s longer on this host."""
    from dsmoe_jax.training.stages import StageRun

    original = StageRun.next_batch

    def next_batch(self, step):
        time.sleep(0.4)
        return original(self, step)

    StageRun.next_batch = next_batch


def test_a_slow_host_is_named(launcher, tmp_path, undisturbed):
    """Both wait for it in every step; its own time is its alone, and the numbers stay the same."""
    run = Run(launcher, tmp_path / "run", 2, before={1: slow_data})
    codes, said = run.end()
    assert codes == [0, 0], said
    assert numbers(run) == numbers(undisturbed)
    rows = read_rows(run.workdir)
    data = np.median([row["host_data_seconds"] for row in rows], axis=0)
    assert data[1] > 0.39 > 0.2 > data[0]
    assert rows[-1]["step_seconds"]["p50"] > 0.39, "the step is as slow as its slowest host"
    status = read_status(run.workdir)
    said = [trouble for trouble in status.troubles if "s a step for itself" in trouble]
    assert len(said) == 1, status.troubles
    assert said[0].startswith(f"host 1 ({os.uname().nodename}) takes 0.4")
    alone = read_rows(undisturbed.workdir)
    assert all(len(row["host_work_seconds"]) == 1 for row in alone)


def assert_same_routing(workdir, wanted):
    """The same files, each with the same arrays of the whole batch."""
    names = {path.relative_to(wanted / "routing") for path in wanted.glob("routing/*/*.npz")}
    assert len(names) == 16 + 1, "steps and a held-out batch"
    assert names == {p.relative_to(workdir / "routing") for p in workdir.glob("routing/*/*.npz")}
    for name in names:
        with np.load(workdir / "routing" / name) as a, np.load(wanted / "routing" / name) as b:
            for key in ("ids_BLSK", "gates_BLSK"):
                np.testing.assert_array_equal(a[key], b[key])


def assert_same_tables(workdir, wanted):
    """The same files of `train.analyse_every`, byte for byte."""
    names = {path.name for path in (wanted / "analysis").iterdir()}
    assert names == {f"{step:08}.{end}" for step in (8, 16) for end in ("json", "npz")}
    for name in names:
        found = (workdir / "analysis" / name).read_bytes()
        assert found == (wanted / "analysis" / name).read_bytes(), name


def test_two_processes_replay_what_one_recorded(launcher, tmp_path, undisturbed):
    """Each reads its own sequences' routing."""
    recorded = f"train.replay_routing={undisturbed.workdir / 'routing'}"
    changes = ("train.record_routing=False", "train.steps=3", "model.moe.router.name=replay_ids")
    run = Run(launcher, tmp_path / "run", 2, *changes, recorded)
    codes, said = run.end()
    assert codes == [0, 0], said
    for row, wanted in zip(numbers(run), numbers(undisturbed)[:3], strict=True):
        assert row["load"] == wanted["load"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def assert_written_by_the_right_ones(workdir):
    """Arrays by both processes, everything else by the first: one TensorBoard a start."""
    shards = {p.name for p in (workdir / "checkpoints/16").glob("*/ocdbt.process_*")}
    assert shards == {"ocdbt.process_0", "ocdbt.process_1"}
    assert len([*(workdir / "tensorboard").iterdir()]) == 3
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "total_loss" in line]
    assert steps == list(range(1, 17))


def test_processes_with_different_configs_all_end_with_the_difference(launcher, tmp_path):
    commands = launcher.commands(tmp_path / "run", 2)
    commands[1].append("--config.train.seed=1")
    for trainer in [launcher.start(command, 2) for command in commands]:
        code, said = trainer.end(PATIENCE)
        assert code == 2, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert line == (
            "error: --config: processes 0 and 1 were given different ones (train.seed: 0 and 1);"
            " all must be given the same"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_launchers_are_recognised(monkeypatch, environment, several):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.detected() is several


@pytest.mark.parametrize("given", [(0,), (0, 1), (0, 2), (1, 2)])
def test_half_an_address_is_refused(given):
    values = [("localhost:1", 2, 0)[i] if i in given else None for i in range(3)]
    with pytest.raises(ValueError, match=r"--.*: missing; .* belong together"):
        hosts.join(*values)


def test_what_fails_on_the_first_fails_on_all(monkeypatch):
    """A full disk too, without anybody waiting for anybody."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for error in (ValueError("no"), OSError("no")):
        told = []
        with monkeypatch.context() as first:
            first.setattr(hosts, "gather", lambda value, told=told: told.append(value) or [value])
            with pytest.raises(ValueError, match="no"):
                hosts.on_first(mock.Mock(side_effect=error))
        with monkeypatch.context() as second:
            second.setattr(jax, "process_index", lambda: 1)
            second.setattr(hosts, "gather", lambda value, told=told: [*told, value])
            with pytest.raises(ValueError, match="no"):
                hosts.on_first(mock.Mock(side_effect=AssertionError))


def test_processes_that_see_different_texts(monkeypatch):
    monkeypatch.setattr(hosts, "gather", lambda value: [value, value, "b"])
    with pytest.raises(ValueError, match=r"data.corpus: a on process 0, b on process 2"):
        hosts.require_same("data.corpus", "a")


def test_one_process_agrees_with_itself():
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.on_first(lambda: 3) == 3
    assert hosts.Vote(jax.make_mesh((1,), ("data",)))(15) == 15
