"""Table 1 for real, at the smoke scale, through its command line: two arms, and probes of one.

That every config trains at this scale is seen elsewhere.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.tools.patience import PATIENCE

ROOT = pathlib.Path(__file__).parents[2]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_trains_models_then_only_reports_and_the_models_can_be_probed(tmp_path):
    arguments = "--scale=smoke", f"--results={tmp_path}", "--arms=dense,deepseekmoe"
    done = run("experiments.table1", *arguments)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "table1-smoke"
    text = (directory / "results.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["arm"] for row in rows] == ["Dense", "DeepSeekMoE"]
    for row in rows:
        assert 4.5 < row["validation_loss"] < 6.3  # ln 512 = 6.24 is knowing nothing
        assert row["data_fingerprint"] == rows[0]["data_fingerprint"]
        assert len(row["domains"]) >= 2
        assert (row["maxvio"] is None) == (row["arm"] == "Dense")
    assert (directory / "report.html").stat().st_size > 50_000
    assert "Report:" in done.stdout

    again = run("experiments.v1.table1", *arguments)
    assert again.returncode == 0, again.stderr
    assert "[1/2]" not in again.stderr, "nothing is trained"
    assert (directory / "results.jsonl").read_text() == text

    done = run("experiments.v1.no_shared_expert", "--scale=smoke", f"--results={tmp_path}")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "no_shared_expert-smoke/results.jsonl").read_text()
    intact, without = (json.loads(line) for line in text.splitlines())
    assert intact["validation_loss"] == rows[1]["validation_loss"]
    assert intact["maxvio"] == rows[1]["maxvio"]
    assert without["validation_loss"] != intact["validation_loss"]
    assert without["flops_per_sequence"] == intact["flops_per_sequence"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--scale=smokey", "smokey"),
        ("--chips=8", "--chips=8: is for --plan, which is not there"),
        ("--set=train.stepz=3", "train.stepz=3: no such key; did you mean train.steps?"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, argument, message):
    done = run("experiments.v1.table1", "--scale=smoke", f"--results={tmp_path / 'runs'}", argument)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_plan_is_printed_and_nothing_is_written(tmp_path):
    done = run(
        "experiments.v1.fig5", "--scale=paper", "--plan", "--chips=64", f"--results={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    assert "chip-hours" in head
    assert [row.split()[0] for row in rows[:2]] == ["GShard", "DeepSeekMoE"]
    assert "fig5 trains nothing: it measures these models of experiments.v1.table1" in done.stdout
    assert done.stdout.count("python -m dsmoe_jax train --config=") == 2
    assert not list(tmp_path.iterdir())


def test_help_lists_the_options():
    done = run("experiments.table1", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("DeepSeekMoE against a dense model")
    for option in ("--scale", "--seeds", "--results", "--arms", "--set", "--report_only", "--plan"):
        assert option.removeprefix("--") in done.stdout
