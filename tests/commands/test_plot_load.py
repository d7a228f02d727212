"""`python -m dsmoe_jax plot_load` draws what runs logged, and overwrites nothing."""

import json

import pytest

from tests.tools.forked import run_all

ROW = {"step": 1, "tokens": 10, "load": [[1, 3], [2, 2]]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("plot_load")
    for name, row in {"run": ROW, "dense": {"step": 1, "tokens": 10, "loss": 1.0}}.items():
        (path / name).mkdir()
        (path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (path / "there.svg").write_text("mine")
    return path


@pytest.fixture(scope="module")
def results(directory):
    cases = {
        "new": ("run", "new.svg"),
        "there": ("run", "there.svg"),
        "dense": ("dense", "dense.svg"),
    }
    lines = [
        ["plot_load", f"--workdir={directory / workdir}", f"--out={directory / out}"]
        for workdir, out in cases.values()
    ]
    return dict(zip((*cases, "none"), run_all([*lines, ["plot_load"]]), strict=True))


def test_a_picture(results, directory):
    assert results["new"] == (0, f"{directory / 'new.svg'}\n", "")
    assert "layer 2" in (directory / "new.svg").read_text()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("there", "there.svg: exists already; name a new file"),
        ("dense", "no row of metrics.jsonl has a load"),
        ("none", "--workdir, --out: both are needed"),
    ],
)
def test_wrong_command_lines(case, says, results, directory):
    code, out, err = results[case]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert (directory / "there.svg").read_text() == "mine"
    assert not (directory / "dense.svg").exists()
