"""Probes of pruned, merged and extracted models on a tiny trained run."""

import numpy as np
import pytest

from dsmoe_jax.data.packing import decode_record, read_records
from dsmoe_jax.moe.interventions import NONE, Intervention
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.study import fewer_experts
from dsmoe_jax.study.fewer_experts import RANKINGS, extracted, merged, pruned, training_text
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.readings import Outcome
from dsmoe_jax.surgery.evidence import BATCH
from experiments.surgery import extraction, merging, pruning

E = 4


@pytest.fixture(scope="module")
def run(finished_run):
    return load_run(finished_run[0])


@pytest.fixture(scope="module")
def trained(finished_run):
    return json_files.read(finished_run[0] / "evaluation.json")


@pytest.fixture(autouse=True, scope="module")
def little_text():
    """Two batches are enough to count on."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fewer_experts, "USE_BATCHES", 2)
        yield


def read(run, trained, found, names):
    outcome = Outcome(run.config, run.config, evaluation=found, trained=trained)
    return {name: MEASURES[name].read(outcome) for name in names}


def test_nothing_pruned_is_the_model(run, trained):
    found = pruned(run, NONE, by="use", keep=E)
    assert found["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    inside = read(run, trained, found, ("rise", "experts_left", "parameters_left"))
    assert inside == {
        "rise": pytest.approx(0, abs=1e-5),
        "experts_left": 100,
        "parameters_left": 100,
    }


@pytest.mark.parametrize("by", RANKINGS)
def test_every_way_of_pruning(run, trained, by):
    found = pruned(run, NONE, by=by, keep=3)
    numbers = read(run, trained, found, pruning.EXPERIMENT.measures)
    assert {name for name, x in numbers.items() if x is None} <= {"most_alike"}
    assert numbers["experts_left"] == 75
    assert 50 < numbers["parameters_left"] < 100
    assert 0 < abs(numbers["rise"]) < 0.5
    assert numbers["rise_percent"] == pytest.approx(100 * numbers["rise"] / trained["loss"])


def test_a_ranking_is_made_once_for_several_numbers(run, monkeypatch):
    calls = []

    def counted(run, subject):
        calls.append(1)
        return fewer_experts._at_random(run, subject)

    monkeypatch.setitem(RANKINGS, "counted", counted)
    monkeypatch.setattr(fewer_experts, "_judged", lambda run, outcome: outcome)
    two, three = (pruned(run, NONE, by="counted", keep=n).report["experts"] for n in (2, 3))
    assert len(calls) == 1
    assert all({*a} < {*b} for a, b in zip(two, three, strict=True))


def test_merging(run, trained):
    found = merged(run, NONE, by="outputs", keep=3)
    numbers = read(run, trained, found, merging.EXPERIMENT.measures)
    assert None not in numbers.values()
    assert numbers["experts_left"] == 75


def test_extraction(run, trained):
    """The losses on and off the domain are those of its text."""
    found = extracted(run, NONE, domains="code", share=0.6)
    numbers = read(run, trained, found, extraction.EXPERIMENT.measures)
    assert None not in numbers.values()
    on = found["domains"]["code_python"]["loss"] - trained["domains"]["code_python"]["loss"]
    assert numbers["rise_on"] == pytest.approx(on)
    assert numbers["off_over_on"] == pytest.approx(numbers["rise_off"] - numbers["rise_on"])
    tokens = [found["domains"][name]["tokens"] for name in found["domains"]]
    losses = [found["domains"][name]["loss"] for name in found["domains"]]
    others = np.array([name != "code_python" for name in found["domains"]])
    off = np.average(np.array(losses)[others], weights=np.array(tokens)[others])
    before = [trained["domains"][name]["loss"] for name in found["domains"]]
    off -= np.average(np.array(before)[others], weights=np.array(tokens)[others])
    assert numbers["rise_off"] == pytest.approx(off)
    general = found["inside"]["general"]["code_python"]["loss"]
    own = found["domains"]["code_python"]["loss"]
    assert numbers["general_over_own"] == pytest.approx(general - own)


def test_experts_are_chosen_on_training_text(run):
    corpus = run.corpus
    whole = training_text(corpus, 2)
    code = training_text(corpus, 2, ["code_python"])
    place = corpus.domains.index("code_python")
    records = [decode_record(r) for r in read_records(corpus.shards("train"))]
    for text, wanted in ((whole, {*range(4)}), (code, {place})):
        sequences = [tokens for domain, tokens in records if domain in wanted][: 2 * BATCH]
        rows = np.concatenate([batch["tokens_BS"] for batch in text])
        for row, tokens in zip(rows, sequences, strict=True):
            np.testing.assert_array_equal(row[: len(tokens) - 1], tokens[:-1])
    assert training_text(corpus, 0) is None


def test_what_does_not_fit_is_refused(run):
    with pytest.raises(ValueError, match="surgery is on the model as it was trained"):
        pruned(run, Intervention(mask_best=1), by="use", keep=3)
    with pytest.raises(ValueError, match=r"^domains='zh': must begin the names of some of code_py"):
        extracted(run, NONE, domains="zh", share=0.5)
    with pytest.raises(ValueError, match=r"^--keep=1: leaves 1 of the 4 experts"):
        merged(run, NONE, by="aligned", keep=1)
