"""Runs whose workdir and corpus are in a bucket: killed, gone on with, and read by the commands."""

import json
import os
import signal
import time

import pytest

from dsmoe_jax.runs import going_on
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_config
from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import place_of
from dsmoe_jax.training.loop import train
from tests.tools.buckets import emulator
from tests.tools.forked import Process, run_all
from tests.tools.patience import PATIENCE
from tests.training.test_loop import assert_same_run

CONFIG_FILE = """
from dsmoe_jax.config import *
def get_config():
    return to_config_dict({config!r})
"""


@pytest.fixture(scope="module")
def bucket(tiny_corpus, tmp_path_factory):
    """The address of a bucket with the corpus."""
    with emulator() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        for path in tiny_corpus.iterdir():
            files.upload(place_of("x", f"{running.address}/corpus/{path.name}"), path.read_bytes())
        yield running.address


def writes_another(workdir):
    """Whether there is a whole checkpoint, and another is being written."""
    steps = {name.split("/")[0] for name in files.sizes(workdir / "checkpoints")}
    whole = [step for step in steps if files.is_whole(workdir / "checkpoints" / step)]
    return 0 < len(whole) < len(steps)


@pytest.fixture(scope="module")
def killed_run(bucket, finished_run, tiny_config, tmp_path_factory):
    """A run that was killed while it wrote a checkpoint, and ended by the same command."""
    workdir = place_of("--workdir", f"{bucket}/run")
    script = tmp_path_factory.mktemp("config") / "tiny.py"
    script.write_text(CONFIG_FILE.format(config=tiny_config(**{"data.corpus": f"{bucket}/corpus"})))
    command = "train", f"--config={script}", f"--workdir={workdir}"
    child = Process(command)
    end = time.monotonic() + PATIENCE
    while not writes_another(workdir) and child.result(wait=False) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    if child.result(wait=False) is None:
        os.kill(child.pid, signal.SIGKILL)
    killed = child.result()
    (done,) = run_all([command])
    return workdir, killed, done


def test_killed_and_gone_on_with(killed_run, finished_run):
    """Bit for bit as undisturbed, and as in a file system."""
    workdir, killed, done = killed_run
    assert killed.code == -signal.SIGKILL, killed.err
    assert done.code == 0, done.err
    assert "going on from step" in done.err
    assert "Traceback" not in done.err
    assert_same_run(workdir, finished_run[0])
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    trained = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert trained == list(range(1, 11)), "each step is in the file once"
    assert any((workdir / "tensorboard").glob("*tfevents*"))


def test_commands_read_it(killed_run, finished_run, tmp_path):
    """`evaluate`, `generate`, `analyse`, `plot_load`, `surgery` and `convert`."""
    workdir, *_ = killed_run

    def measures(workdir):
        return [
            ("evaluate", f"--workdir={workdir}", "--json", "--max_batches=1", "--batch_size=4"),
            ("generate", f"--workdir={workdir}", "--prompt=def", "--max_new_tokens=4"),
        ]

    to = tmp_path
    others = [
        ("analyse", f"--workdir={workdir}", f"--to={to}/looked", "--max_tokens=256"),
        ("plot_load", f"--workdir={workdir}", f"--out={to}/load.svg"),
        ("surgery", "prune", f"--from={workdir}", f"--to={to}/pruned", "--keep=2",
         "--by=weights", f"--loads={workdir}/metrics.jsonl"),
        ("convert", f"--from={workdir}", f"--to_hf={to}/hf"),
    ]  # fmt: skip
    there = run_all([*measures(workdir), *others])
    here = run_all(measures(finished_run[0]))
    assert [result.code for result in there] == [0] * 6, [result.err for result in there]
    assert [result.out for result in there[:2]] == [result.out for result in here]
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"looked", "load.svg", "pruned", "hf"}


def test_going_back(killed_run, tiny_config, bucket):
    """Steps that are left are removed, and what there was is kept."""
    workdir, *_ = killed_run
    before = (workdir / "metrics.jsonl").read_bytes()
    changed = {"data.corpus": f"{bucket}/corpus", "train.skip_batches": ((10, 1),)}
    with pytest.raises(ValueError, match="--go_back removes what came after step 9"):
        train(tiny_config(**changed), workdir, progress=False)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert train(tiny_config(**changed), workdir, progress=False, go_back=True).resumed_from == 9
    assert going_on.saved_steps(workdir) == [9, 10]
    history = workdir / "history/00000001"
    assert json.loads((history / "change.json").read_bytes())["removed"] == [10]
    assert (history / "metrics.jsonl").read_bytes() == before
    assert [row["step"] for row in read_rows(workdir)] == list(range(1, 11))


def test_all_that_a_run_writes(bucket, tiny_config, tmp_path):
    """Recorded routing, tables and a profile; and a run that begins with another one's model."""
    more = {
        "data.corpus": f"{bucket}/corpus",
        "train.steps": 6,
        "train.record_routing": True,
        "train.analyse_every": 3,
    }
    train(tiny_config(**more), f"{bucket}/all", progress=False, profile=1)
    written = {name.split("/")[0] for name in files.sizes(place_of("--workdir", f"{bucket}/all"))}
    assert {"routing", "analysis", "tensorboard", "evaluation.json"} <= written
    names = files.sizes(place_of("--workdir", f"{bucket}/all/tensorboard"))
    assert any(name.endswith(".xplane.pb") for name in names)
    config = tiny_config(
        **{"train.start_from": f"{bucket}/all", "data.corpus": f"{bucket}/corpus", "train.steps": 3}
    )
    train(config, tmp_path / "next", progress=False)
    assert read_config(tmp_path / "next").train.start_from == f"{bucket}/all"
    assert read_rows(tmp_path / "next")[0]["step"] == 0, "measured before the first step"
