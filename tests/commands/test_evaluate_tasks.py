"""`python -m dsmoe_jax evaluate --tasks=...` on trained runs: table, JSON, and bad input."""

import json
import shutil

import pytest

from dsmoe_jax.evaluation.likelihood import Request, Scorer, encode
from dsmoe_jax.runs.loading import load_writer
from tests.tools.forked import run_all

ROWS = [
    {"context": "def f(x", "choices": ["):", " zebra"], "label": 0},
    {"context": "x", "choices": ["):", " zebra"], "label": 1},
]


@pytest.fixture(scope="module")
def directory(finished_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    for name in ("a", "b", "broken"):
        shutil.copytree(finished_run[0], path / name)
    shutil.rmtree(path / "broken" / "checkpoints")
    (path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n{}\n")
    return path


@pytest.fixture(scope="module")
def results(directory):
    def runs(*names):
        return [f"--workdir={directory / name}" for name in names]

    own = [f"--tasks={directory / 'own.jsonl'}", "--batch_size=2", "--max_length=32"]
    out = directory / "two.json"
    never = directory / "never.json"
    cases = {
        "two": [*runs("a", "b"), *own, "--shots=1", "--limit=1", "--json", f"--out={out}"],
        "interrupted": [*runs("a", "broken"), *own, "--limit=1", f"--out={never}"],
        "bad": [*runs("a"), f"--tasks={directory / 'bad.jsonl'}", f"--out={directory / 'x.json'}"],
        "unknown": [*runs("a"), "--tasks=piqua"],
        "nothing": [*runs("a"), "--tasks="],
        "of text": [*runs("a"), *own, "--max_batches=2"],
        "of tasks": [*runs("a"), "--limit=2"],
        "two texts": runs("a", "b"),
        "nowhere": [*runs("a", "nowhere"), *own],
    }  # fmt: skip
    return dict(zip(cases, run_all([["evaluate", *case] for case in cases.values()]), strict=True))


def test_two_runs_with_the_numbers_of_the_scorer(results, directory):
    assert results["two"].code == 0, results["two"].err
    found = json.loads((directory / "two.json").read_text())
    assert found == json.loads(results["two"].out)
    assert list(found["runs"]) == ["a", "b"]
    one = found["runs"]["a"]
    assert one == found["runs"]["b"]  # the same run
    ((_, numbers),) = one["tasks"].items()
    assert (one["step"], one["max_length"]) == (10, 32)
    assert (numbers["shots"], numbers["questions"]) == (1, 1)
    run = load_writer(directory / "a")
    requests = [Request("def f(x):\n\nx", text) for text in ROWS[1]["choices"]]
    scored = Scorer(run.model, 32, 2).score(encode(run.tokenizer, requests))
    assert numbers["accuracy"]["value"] == float(scored[1].nats > scored[0].nats)
    bits = -scored[1].nats / 0.6931471805599453 / len("zebra")
    assert numbers["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)


def test_a_run_that_fails_leaves_nothing(results, directory):
    """The first run was measured by then."""
    assert results["interrupted"].code == 2
    assert "the run has no checkpoint yet" in results["interrupted"].err
    files = {path.name for path in directory.iterdir() if path.is_file()}
    assert files == {"own.jsonl", "bad.jsonl", "two.json"}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("bad", "bad.jsonl:2: needs a field 'context' (its fields: none)"),
        ("unknown", "--tasks=piqua: neither a file nor one of arc_easy, "),
        ("nothing", "--tasks='': must name a question set or a file"),
        ("of text", "--max_batches: is for held-out text; must be left out with --tasks"),
        ("of tasks", "--limit: is for questions, which --tasks names"),
        ("two texts", "a second run is for --tasks; give only one"),
        ("nowhere", "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(case, says, results):
    code, out, err = results[case]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert says in err
