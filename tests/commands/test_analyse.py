"""`python -m dsmoe_jax analyse` on a trained run: its files, their numbers, and bad input."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.analysis.routed_text import route_text, with_routing
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.report.names import telling_apart
from dsmoe_jax.runs import routing_records
from dsmoe_jax.runs.loading import load_run
from tests.tools.forked import run_all


@pytest.fixture(scope="module")
def directory(finished_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("analyse")
    shutil.copytree(finished_run[0], path / "a")
    shutil.copytree(finished_run[0], path / "b", ignore=shutil.ignore_patterns("9"))
    (path / "there").mkdir()
    (path / "texts").mkdir()
    (path / "texts" / "thai.txt").write_text("สวัสดีชาวโลก " * 20)
    record(path / "b", path / "routing")
    return path


def record(workdir, to):
    """Records the routing of three held-out batches."""
    run = load_run(workdir)
    graph, params, other = nnx.split(run.model, nnx.Param, ...)
    held_out = HeldOut(graph, run.corpus, 4, keep_routing=True)
    belongs = routing_records.belongs_to(run.config, run.corpus.fingerprint)
    recorder = routing_records.Recorder(to, belongs)
    batches = itertools.islice(held_out.routings(params, other), 3)
    for number, routing in enumerate(batches, start=1):
        recorder.write(routing_records.validation_name(run.step), number, routing)


@pytest.fixture(scope="module")
def results(directory):
    runs = [f"--workdir={directory / name}" for name in ("a", "b")]
    few = ["--max_tokens=300", "--batch_size=4"]
    replay = f"--replay_routing={directory / 'routing/train'}"
    corpus = f"--corpus={directory / 'texts'}"
    missing = f"--to={directory / 'missing'}"
    cases = {
        "two": [*runs, *few, f"--to={directory / 'two'}"],
        "own": [runs[1], "--without_shared", corpus, f"--to={directory / 'own'}"],
        "there": [runs[0], f"--to={directory / 'there'}"],
        "twice": [runs[0], runs[0], f"--to={directory / 'twice'}"],
        "missing": [f"--workdir={directory / 'nowhere'}", missing],
        "no text": [runs[1], f"--corpus={directory / 'none'}", missing],
        "no record": [runs[1], replay, missing],
        "two records": [*runs, replay, missing],
        "none": [],
    }  # fmt: skip
    lines = [["analyse", *case] for case in cases.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CACHE", str(directory / "cache"))
        return dict(zip(cases, run_all(lines), strict=True))


def test_two_runs_side_by_side(results, directory):
    assert results["two"].code == 0, results["two"].err
    assert results["two"].out == f"{directory / 'two' / 'report.html'}\n"
    names = {path.name for path in (directory / "two").iterdir()}
    assert names == {"analysis.json", "report.html", "a.html", "b.html", "side_by_side.html"}
    found = json.loads((directory / "two" / "analysis.json").read_text())
    assert list(found) == ["a", "b"]
    assert found["a"].pop("saturation").keys() == {"step 9"}
    assert found["b"].pop("saturation") == {}  # it has no earlier checkpoint
    assert found["a"] == found["b"]  # the same run
    report = (directory / "two" / "report.html").read_text()
    assert "committee" in report
    assert "http" not in report.replace("http://www.w3.org/", "")


def test_the_numbers_are_those_of_the_routing(results, directory):
    run = load_run(directory / "a")
    text = route_text(run.model, run.corpus, max_tokens=300, batch_size=4)
    found = json.loads((directory / "two" / "analysis.json").read_text())["a"]
    assert text.n_tokens == 300
    assert (np.diff(text.sequence_T) >= 0).all()
    load_LE = [np.bincount(ids.ravel(), minlength=text.n_experts) for ids in text.ids_LTK]
    np.testing.assert_array_equal(found["load"]["load"], load_LE)
    assert sum(found["domains"]["tokens"]) == text.n_tokens
    np.testing.assert_array_equal(np.sum(found["domains"]["load"], axis=0), load_LE)
    assert np.diag(found["similarity"]["layers"][0]["weights"]) == pytest.approx(1.0)
    moe = run.model.layers.moe
    flat = [np.asarray(w[...])[0] for w in (moe.gate_EFD, moe.up_EFD, moe.down_EDF)]
    vectors = np.concatenate([w.reshape(text.n_experts, -1) for w in flat], axis=1)
    cosine = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    assert found["similarity"]["layers"][0]["weights"][0][1] == pytest.approx(cosine, abs=1e-5)


def test_recorded_routing_is_that_of_the_run(directory):
    run = load_run(directory / "b")
    folder = str(directory / "routing/validation-00000010")
    recording, name = routing_records.of_held_out(folder, run.config, run.corpus.fingerprint)
    found = with_routing(run.corpus, recording.batches(name), 4, max_tokens=300)
    own = route_text(run.model, run.corpus, max_tokens=300, batch_size=4)
    for field in dataclasses.fields(own):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(own, field.name))


def test_text_in_letters_that_the_vocabulary_lacks(results, directory):
    """It is bytes to the model; the page shows whole letters all the same."""
    assert results["own"].code == 0, results["own"].err
    found = json.loads((directory / "own" / "analysis.json").read_text())
    assert list(found) == ["b", "b-without-shared"]
    assert found["b"]["domains"]["names"] == ["texts"]
    kept_L = found["b-without-shared"]["saturation"]["with shared experts"]
    assert kept_L[0] == 1 > kept_L[1]  # the first layer gets the same
    page = (directory / "own" / "b.html").read_text()
    assert "\ufffd" not in page
    assert "ส" in page


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("there", "there: exists already; name a new folder"),
        ("twice", "is given twice"),
        ("missing", "nowhere"),
        ("no text", "no such file or directory"),
        ("no record", "holds no held-out batches"),
        ("two records", "--replay_routing: is of one run and its own text; give one --workdir"),
        ("none", "--workdir, --to: both are needed"),
    ],
)
def test_bad_input_leaves_nothing(case, says, results, directory):
    code, out, err = results[case]
    assert (code, out) == (2, "")
    assert says in err.splitlines()[-1]
    left = {path.name for path in directory.iterdir()}
    kept = {"texts", "cache", "routing"}
    assert left - kept == {"a", "b", "there", "two", "own"}


def test_names_are_the_shortest_that_differ():
    assert telling_apart(["x/dsmoe/seed0", "x/gshard/seed0"]) == ["dsmoe-seed0", "gshard-seed0"]
    assert telling_apart(["runs/dsmoe"]) == ["dsmoe"]
    with pytest.raises(ValueError, match="x: is given twice"):
        telling_apart(["x", "y", "./x"])
