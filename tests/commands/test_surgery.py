"""`python -m dsmoe_jax surgery`: refusals in one line, and a placement from end to end."""

import json
from pathlib import Path

import pytest

from tests.tools.forked import assert_refused, run_all

FLAGS = {
    (): "needs a word before its flags: ",
    ("plaice",): "'plaice': no such word here; did you mean place?",
    ("place", "--from=x"): "--from, --to: both are needed",
    ("place", "--from=RUN", "--to=NEW"): "--loads: missing; Recorded loads:",
    ("upcycle", "--from=RUN", "--to=NEW"): "--copies: missing; Copies of each FFN",
    ("upcycle", "--from=RUN", "--to=NEW", "--copies=2"): "n_routed_experts=4: is a mixture already",
    ("prune", "--from=RUN", "--to=NEW", "--keep=1"): "--keep=1: leaves 1 of the 4 experts",
    ("merge", "--from=RUN", "--to=NEW", "--keep=3"): "--moments=carried: they have no meaning",
    ("extract", "--from=RUN", "--to=NEW", "LOADS", "--devices=2"): "no meaning for extract",
    ("extract_task", "--from=RUN", "--to=NEW"): "--task: missing; Of model.moe.router.tasks",
    ("extract_task", "--from=RUN", "--to=NEW", "--task=a"): "--task='a': has no meaning for this",
    ("place", "--from=RUN", "--to=RUN", "LOADS", "--devices=2"): "exists already; name a new or",
    ("place", "--from=RUN", "--to=NEW", "LOADS", "--devices=3"): "--devices=3: must divide the 4",
    ("place", "--from=RUN", "--to=NEW", "LOADS", "--devices=2", "--step=8"): "--step=8: no such",
}


@pytest.fixture(scope="module")
def places(finished_run, tmp_path_factory):
    run = finished_run[0]
    new = tmp_path_factory.mktemp("new") / "workdir"
    return {"RUN": str(run), "NEW": str(new), "LOADS": f"--loads={run}/metrics.jsonl"}


@pytest.fixture(scope="module")
def refusals(places):
    def filled(argument):
        for name, value in places.items():
            argument = argument.replace(name, value)
        return argument

    cases = [["surgery", *map(filled, case)] for case in FLAGS]
    return dict(zip(FLAGS, run_all(cases), strict=True))


@pytest.mark.parametrize("case", FLAGS, ids=" ".join)
def test_refusals(refusals, case):
    assert_refused(refusals[case], FLAGS[case])


def test_nothing_was_written(refusals, places):
    assert [*Path(places["NEW"]).parent.iterdir()] == []


def test_a_placement(places, tmp_path):
    arguments = ["surgery", "place", f"--from={places['RUN']}", places["LOADS"], "--devices=2"]
    (shown,) = run_all([[*arguments, f"--to={tmp_path}/a", "--places=6"]])
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].endswith("of 5 batches that decided, and of 5 others")
    assert [line.split()[0] for line in lines[1:4]] == ["before", "after", "6"]
    assert "replicas are not made" in lines[3]
    assert lines[4:] == ["use it with --config.mesh.expert=2", f"{tmp_path}/a: step 10"]
    (entry,) = json.loads((tmp_path / "a/surgery.json").read_text())["operations"]
    assert entry["options"]["places"] == 6
