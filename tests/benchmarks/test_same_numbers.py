"""The comparison of two checkouts, on made-up rows and with made-up checkouts."""

import copy
import json

import pytest

from benchmarks import same_numbers
from benchmarks.same_numbers import MISSING, Difference, Keys, Run, compare_rows, selected

ROWS = [
    {"step": 1, "loss": 6.25, "load": [[3, 5], [4, 4]], "router_z": [0.5], "overhead": 0.1},
    {"step": 2, "loss": float("nan"), "load": [[2, 6], [4, 4]], "router_z": [0.5]},
    {"step": 2, "validation_domains": {"code": {"loss": 5.0, "tokens": 7}}},
]


def changed(row, key, value):
    """The rows with one key of one row changed, and another one that the clock decides."""
    rows = copy.deepcopy(ROWS)
    rows[row][key] = value
    rows[0]["overhead"] = 0.2
    return rows


def test_equal_rows_are_identical_but_for_the_clock():
    assert compare_rows(ROWS, changed(0, "loss", 6.25), Keys()) == []


@pytest.mark.parametrize(
    ("row", "key", "value", "difference"),
    [
        (0, "loss", 6.250000000000001, Difference(1, "loss", 6.25, 6.250000000000001)),
        (0, "load", [[3, 5], [4, 3]], Difference(1, "load[1][1]", 4, 3)),
        (0, "load", [[3, 5]], Difference(1, "load", [[3, 5], [4, 4]], [[3, 5]])),
        (0, "load", [[3, 5], [4, 4.0]], Difference(1, "load[1][1]", 4, 4.0)),
        (2, "step", 3, Difference(3, "step", 2, 3)),
        (1, "entropy", 1.0, Difference(2, "entropy", MISSING, 1.0)),
        (
            2,
            "validation_domains",
            {"code": {"loss": 5.0, "bytes": 7}},
            Difference(2, "validation_domains[code][tokens]", 7, MISSING),
        ),
    ],
)
def test_what_differs(row, key, value, difference):
    (found,) = compare_rows(ROWS, changed(row, key, value), Keys())
    assert found == difference
    assert type(found.new) is type(difference.new)


def test_the_first_step_of_each_key_is_named():
    new = [{**row, "loss": 1.0} for row in ROWS]
    new[1]["load"] = [[1, 7], [4, 4]]
    found = compare_rows(ROWS, new, Keys())
    assert [(d.step, d.key) for d in found] == [(1, "loss"), (2, "load[0][0]")]
    assert str(found[0]) == "loss at step 1: 6.25 -> 1.0"


def test_a_key_that_is_gone():
    new = copy.deepcopy(ROWS)
    del new[0]["router_z"]
    assert compare_rows(ROWS, new, Keys()) == [Difference(1, "router_z", [0.5], MISSING)]


def test_another_number_of_rows():
    assert compare_rows(ROWS, ROWS[:1], Keys()) == [Difference(2, "number of rows", 3, 1)]
    assert compare_rows(ROWS[:2], ROWS, Keys()) == [Difference(2, "number of rows", 2, 3)]


def test_renamed_keys():
    """The term `router_z` took the key of the mean of that name; the other row has no term."""
    new = copy.deepcopy(ROWS)
    new[0] |= {"balance_router_z": [0.5], "router_z": [0.75]}
    renamed = {"router_z": "balance_router_z"}
    added = frozenset({"router_z"})
    assert compare_rows(ROWS, new, Keys(renamed, added)) == []
    assert [d.key for d in compare_rows(ROWS, new, Keys(renamed))] == ["router_z"]
    new[0]["balance_router_z"] = [0.25]
    (found,) = compare_rows(ROWS, new, Keys(renamed, added))
    assert found == Difference(1, "balance_router_z[0]", 0.5, 0.25)


def test_flags_may_be_repeated():
    flags = same_numbers.parse_flags(
        [".", ".", "--workdir=x", "--renamed", "a=b", "c=d", "--renamed=e=f", "--added=g"]
    )
    assert dict(flags.renamed) == {"a": "b", "c": "d", "e": "f"}
    assert flags.added == ["g"]


def test_selection():
    runs = [Run("smoke", "a"), Run("smoke", "b"), Run("demo", "a")]
    assert selected(runs, None) == runs
    assert selected(runs, "demo") == runs[2:]
    assert selected(runs, "a") == [runs[0], runs[2]]
    assert selected(runs, "demo-a,b") == runs[1:]
    with pytest.raises(ValueError, match="--only=c: must be"):
        selected(runs, "a,c")


TRAINER = """
import json, pathlib, sys
config, workdir = (arg.partition("=")[2] for arg in sys.argv[-2:])
if {fails!r} in config:
    sys.exit("error: it fails")
workdir = pathlib.Path(workdir)
workdir.mkdir()
rows = [dict(step=1, loss=6.5), dict(step=2, loss={loss})]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(workdir / "evaluation.json").write_text(json.dumps(dict(step=2, loss={loss})))
"""


@pytest.fixture
def checkout(tmp_path):
    """`checkout("old", "dsmoe_jax/train.py", loss=6.0)`: a checkout whose training is made up."""

    def make(name, entry, loss, configs=("toy", "other"), fails="nothing"):
        root = tmp_path / name
        for path in (root / entry, root / "configs/base.py"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        for config in configs:
            (root / f"configs/{config}.py").write_text("")
        (root / "dsmoe_jax/__init__.py").write_text("")
        (root / entry).write_text(TRAINER.format(loss=loss, fails=fails))
        return str(root)

    return make


def run(tmp_path, capsys, *checkouts):
    """Exit code, and what is said of each run at smoke scale."""
    workdir = f"--workdir={tmp_path / 'runs'}"
    with pytest.raises(SystemExit) as ended:
        same_numbers.main([*checkouts, workdir, "--only=smoke"])
    *lines, _ = capsys.readouterr().out.splitlines()
    return ended.value.code, dict(line.split(maxsplit=1) for line in lines)


OLD, NEW = "dsmoe_jax/train.py", "dsmoe_jax/__main__.py"  # `-m dsmoe_jax.train`, `-m dsmoe_jax`


def test_two_checkouts(checkout, tmp_path, capsys):
    old, new = checkout("old", OLD, 6.0), checkout("new", NEW, 6.0)
    code, said = run(tmp_path, capsys, old, new)
    assert (code, said) == (0, {"smoke-toy": "identical", "smoke-other": "identical"})
    # Changed code is trained anew, unchanged code is not.
    finished = sorted(tmp_path.glob("runs/*/smoke-toy/evaluation.json"))
    times = [path.stat().st_mtime_ns for path in finished]
    code, said = run(tmp_path, capsys, old, checkout("new", NEW, 6.5, fails="other"))
    assert code == 1
    assert said["smoke-toy"] == (
        "differs: loss at step 2: 6.0 -> 6.5; loss in the evaluation: 6.0 -> 6.5"
    )
    assert said["smoke-other"] == f"failed: exit code 1 in {new}: error: it fails"
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert len(list(tmp_path.glob("runs/*/smoke-toy/evaluation.json"))) == 3


def test_a_config_that_is_gone(checkout, tmp_path, capsys):
    old, new = checkout("old", OLD, 6.0), checkout("new", NEW, 6.0, configs=("toy",))
    code, said = run(tmp_path, capsys, old, new)
    assert code == 1
    assert said == {
        "smoke-other": f"configs/other.py: not in {new}",
        "smoke-toy": "identical",
    }


def test_every_config_of_the_repository_is_compared():
    runs = same_numbers.runs_of(same_numbers.Path(__file__).parents[2])
    configs = {config for scale, config in runs if scale == "smoke"}
    assert {"dsmoe_2b", "dsmoe_2b_staged", "deepseek_67b"} <= configs
    assert not configs & same_numbers.NO_MODEL
    assert [config for scale, config in runs if scale == "demo"] == [
        "dense_2b",
        "hash_2b",
        "switch_2b",
        "gshard_2b",
        "dsmoe_2b",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "nowhere"], "nowhere: must be a checkout"),
        ([".", ".", "--only=dsmoe_3b"], "--only=dsmoe_3b: must be a scale"),
        ([".", ".", "--renamed", "loss"], "loss: must be OLD=NEW"),
    ],
)
def test_wrong_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        same_numbers.main([*arguments, "--workdir=unused"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_workdir_is_compared_whole(tmp_path):
    """Rows and evaluation, from the files that a run writes."""
    for name, loss in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "x": 1}) + "\n")
        evaluation = {"step": 1, "loss": loss, "tokens_per_second": loss}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(evaluation))
    (found,) = same_numbers.compare(tmp_path / "old", tmp_path / "new", Keys())
    assert str(found) == "loss in the evaluation: 1.0 -> 2.0"
