"""Runs whose workdir, corpus, teacher or recording is in a bucket, and commands that read them.

Two processes that are killed and go on in a bucket are in tests/parallel/test_hosts.py.
"""

import json

import pytest

from dsmoe_jax.runs import going_on
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_config
from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import place_of
from dsmoe_jax.training.loop import train
from tests.tools.buckets import emulator
from tests.tools.forked import run_all
from tests.training.test_loop import assert_same_run


@pytest.fixture(scope="module")
def bucket(tiny_corpus, tmp_path_factory):
    """The address of a bucket with the corpus."""
    with emulator() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        for path in tiny_corpus.iterdir():
            files.upload(place_of("x", f"{running.address}/corpus/{path.name}"), path.read_bytes())
        yield running.address


@pytest.fixture(scope="module")
def workdir(bucket, tiny_config):
    """A finished run."""
    train(tiny_config(**{"data.corpus": f"{bucket}/corpus"}), f"{bucket}/run", progress=False)
    return place_of("--workdir", f"{bucket}/run")


@pytest.fixture(scope="module")
def all_written(bucket, tiny_config):
    """The workdir of a run that records its routing, analyses itself and is profiled."""
    more = {
        "data.corpus": f"{bucket}/corpus",
        "train.steps": 6,
        "train.record_routing": True,
        "train.analyse_every": 3,
    }
    train(tiny_config(**more), f"{bucket}/all", progress=False, profile=1)
    return place_of("--workdir", f"{bucket}/all")


def test_the_same_run_as_on_a_disk(workdir, finished_run):
    """Bit for bit."""
    assert_same_run(workdir, finished_run[0])
    assert any((workdir / "tensorboard").glob("*tfevents*"))


def test_commands_read_it(workdir, finished_run, tmp_path):
    """`evaluate`, `generate`, `analyse`, `plot_load`, `surgery` and `convert`."""
    to = tmp_path
    measured, generated, *others = run_all([
        ("evaluate", f"--workdir={workdir}", "--json", "--max_batches=2", "--batch_size=4"),
        ("generate", f"--workdir={workdir}", "--prompt=def", "--max_new_tokens=2"),
        ("analyse", f"--workdir={workdir}", f"--to={to}/looked", "--max_tokens=256"),
        ("plot_load", f"--workdir={workdir}", f"--out={to}/load.svg"),
        ("surgery", "prune", f"--from={workdir}", f"--to={to}/pruned", "--keep=2",
         "--by=weights", f"--loads={workdir}/metrics.jsonl"),
        ("convert", f"--from={workdir}", f"--to_hf={to}/hf"),
    ])  # fmt: skip
    for result in (measured, generated, *others):
        assert result.code == 0, result.err
    assert json.loads(measured.out)["loss"] == finished_run[1].evaluation["loss"]
    assert generated.out
    assert {path.name for path in to.iterdir()} == {"looked", "load.svg", "pruned", "hf"}


def test_all_that_a_run_writes(all_written):
    """Recorded routing, tables and a profile."""
    names = files.sizes(all_written)
    written = {name.split("/")[0] for name in names}
    assert {"routing", "analysis", "tensorboard", "evaluation.json"} <= written
    assert any(name.endswith(".xplane.pb") for name in names)


def test_a_teacher_and_a_beginning(bucket, workdir, finished_run, tiny_config, tmp_path):
    """The run there, as teacher and as what a run begins with, is the one here, bit for bit."""

    def rows(name, taught_by):
        config = tiny_config(**{
            "train.steps": 2,
            "train.eval_batches": 1,
            "train.start_from": str(taught_by),
            "train.distillation.teacher": str(taught_by),
            "train.distillation.factor": 0.5,
        })  # fmt: skip
        train(config, tmp_path / name, progress=False)
        found = read_rows(tmp_path / name)
        assert found[0]["step"] == 0, "measured before the first step"
        return [(row.get("total_loss"), row.get("grad_norm"), row["step"]) for row in found]

    assert rows("there", workdir) == rows("here", finished_run[0])
    there = read_config(tmp_path / "there").train
    assert there.start_from == there.distillation.teacher == str(workdir)


def test_a_replay(all_written, tiny_config, tmp_path):
    """The routing of the recorded run."""
    changes = {
        "train.steps": 2,
        "train.eval_batches": 1,
        "model.moe.router.name": "replay_ids",
        "train.replay_routing": f"{all_written}/routing",
    }
    train(tiny_config(**changes), tmp_path / "run", progress=False)
    found, recorded = read_rows(tmp_path / "run"), read_rows(all_written)
    assert [row["load"] for row in found] == [row["load"] for row in recorded[:2]]
    assert found[0]["loss"] == pytest.approx(recorded[0]["loss"], rel=1e-6)


def test_going_back(workdir, tiny_config, bucket):
    """Steps that are left are removed, and what there was is kept.  The last test of this run."""
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
