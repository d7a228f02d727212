"""Table 1 for real, at the smoke scale, through its command line: two arms, and probes of one.

That every config trains at this scale is seen elsewhere.
"""

import json

import pytest

from tests.tools.forked import run_all


def run(module, *arguments):
    (result,) = run_all([arguments], module=module)
    return result


def test_trains_models_then_only_reports_and_the_models_can_be_probed(tmp_path):
    arguments = "--scale=smoke", f"--results={tmp_path}", "--arms=dense,deepseekmoe"
    done = run("experiments.table1", *arguments)
    assert done.code == 0, done.err
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
    assert "Report:" in done.out

    again = run("experiments.v1.table1", *arguments)
    assert again.code == 0, again.err
    assert "[1/2]" not in again.err, "nothing is trained"
    assert (directory / "results.jsonl").read_text() == text

    done = run("experiments.v1.no_shared_expert", "--scale=smoke", f"--results={tmp_path}")
    assert done.code == 0, done.err
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
    assert done.code == 2
    assert done.err.count("\n") == 1, done.err
    assert message in done.err
    assert not (tmp_path / "runs").exists()


def test_a_plan_is_printed_and_nothing_is_written(tmp_path):
    done = run(
        "experiments.v1.fig5", "--scale=paper", "--plan", "--chips=64", f"--results={tmp_path}"
    )
    assert done.code == 0, done.err
    head, _, *rows = done.out.splitlines()
    assert "chip-hours" in head
    assert [row.split()[0] for row in rows[:2]] == ["GShard", "DeepSeekMoE"]
    assert "fig5 trains nothing: it measures these models of experiments.v1.table1" in done.out
    assert done.out.count("python -m dsmoe_jax train --config=") == 2
    assert not list(tmp_path.iterdir())


def test_help_lists_the_options():
    done = run("experiments.table1", "--help")
    assert done.code == 0
    assert done.out.startswith("DeepSeekMoE against a dense model")
    for option in ("--scale", "--seeds", "--results", "--arms", "--set", "--report_only", "--plan"):
        assert option.removeprefix("--") in done.out
