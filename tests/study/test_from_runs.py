"""Arms that begin with a finished run of another experiment, or with what surgery makes of it."""

import dataclasses
import json
import pathlib
import shlex

import pytest
from made_up_runs import FakeTrain, run_made_up

from dsmoe_jax.report import plan_tables
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.study import made_models
from dsmoe_jax.study.cells import Options, make_cells
from dsmoe_jax.study.experiment import Arm, Equal, Experiment, FinishedRun
from dsmoe_jax.study.plans import Hardware, plan_arms
from experiments.recipe import fine_tuning
from experiments.surgery import upcycling
from experiments.v1 import fig5, table1

START = "train.start_from"
DENSE = FinishedRun(table1.EXPERIMENT, "Dense")
CUT = ("upcycle", {"copies": 16, "parts": 4, "shared": 1})
UPCYCLED = dataclasses.replace(DENSE, operations=(CUT, ("place", {"devices": 2, "loads": "x"})))
FLOPS = ("flops_before", "training_flops", "total_training_flops")
LATER = Experiment(
    module="experiments.later",
    title="later",
    source="",
    summary="",
    arms=(
        Arm("fresh", "dense_2b", overrides={"train.steps": 16}),
        Arm("longer", "dense_2b", from_runs={START: DENSE}),
        Arm("upcycled", "dsmoe_2b", from_runs={START: UPCYCLED}),
    ),
    may_differ=("name", "model.", "train.steps", START),
    measured_may_differ=("tokens",),
    measures=("validation_loss", *FLOPS),
)


class Seen(FakeTrain):
    """Remembers what runs begin with."""

    def __init__(self, **options):
        super().__init__(**options)
        self.starts = []

    def __call__(self, config, workdir):
        self.starts.append(config.train.start_from)
        super().__call__(config, workdir)


@pytest.fixture(autouse=True)
def operated(monkeypatch):
    """Operations that surgery was asked for; it makes empty workdirs."""
    found = []

    def operate(name, workdir, to, options, *, moments):
        found.append((name, workdir, to, options, moments))
        pathlib.Path(to).mkdir(parents=True)

    monkeypatch.setattr(made_models, "operate", operate)
    return found


def test_runs_begin_with_what_another_experiment_trained(fake_run, tmp_path, operated):
    fake_run(arms=("dense",), seeds=2)
    train = Seen()
    comparison = fake_run(train, LATER, seeds=2)
    assert all(row.finished for row in comparison.rows)
    models = tmp_path / "runs/models-smoke"
    cells = make_cells(LATER, Options("smoke", seeds=2, results=str(tmp_path / "runs")))
    upcycled = [cell.workdir for cell in cells if cell.arm.label == "upcycled"]
    made = [path.with_name(f"{path.name}-{START}") for path in upcycled]
    assert train.starts == [
        start
        for seed in (0, 1)
        for start in (None, f"{models}/dense_2b/seed{seed}", f"{made[seed]}/2_place")
    ]
    for seed in (0, 1):
        first, second = operated[2 * seed : 2 * seed + 2]
        dense, once, twice = (
            str(path)
            for path in (
                models / f"dense_2b/seed{seed}",
                made[seed] / "1_upcycle",
                made[seed] / "2_place",
            )
        )
        assert first[:3] == ("upcycle", dense, once)
        assert second[:3] == ("place", once, twice)
        assert {**first[3], **CUT[1], "seed": seed} == first[3]
        assert first[4] == second[4] == "none"


def test_what_is_made_is_not_made_again(fake_run, operated):
    fake_run(arms=("dense",))
    with pytest.raises(KeyboardInterrupt):
        fake_run(Seen(stop_after=3), LATER)
    assert len(operated) == 2
    train = Seen()
    fake_run(train, LATER)
    assert len(train.starts) == 1
    fake_run(train, LATER)
    assert len(train.starts) == 1
    assert len(operated) == 2


def test_each_arm_is_a_task_of_an_array(fake_run):
    fake_run(arms=("dense",), seeds=2)
    calls = []
    for cell in range(6):
        train = Seen()
        comparison = fake_run(train, LATER, seeds=2, cell=cell)
        calls += train.calls
    assert len(calls) == 6
    assert all(row.finished for row in comparison.rows)


def test_a_run_that_is_not_there_is_named_with_the_command_that_trains_it(fake_run, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"models-smoke/dense_2b/seed0: holds no finished run, which longer, seed 0 needs for"
        r" train\.start_from; train it with python -m experiments\.v1\.table1 --scale=smoke"
        r" --seeds=1 --arms=dense$",
    ):
        fake_run(experiment=LATER, seeds=1)
    assert not (tmp_path / "runs").exists()


def test_overrides_are_of_the_start_too_but_for_keys_that_the_arm_sets(fake_run):
    overrides = {"train.steps": 4, "model.vocab_size": 600}
    steps_of_its_own = dataclasses.replace(LATER.arms[1], overrides={"train.steps": 2})
    experiment = dataclasses.replace(LATER, arms=(LATER.arms[0], steps_of_its_own))
    with pytest.raises(ValueError, match=r"--arms=dense --set=model\.vocab_size=600$"):
        fake_run(experiment=experiment, overrides=overrides)
    fake_run(arms=("dense",), overrides={"model.vocab_size": 600})
    train = Seen()
    fake_run(train, experiment, overrides=overrides)
    assert len(train.calls) == 2


def test_a_start_of_ones_own_takes_its_place(fake_run, operated):
    train = Seen()
    fake_run(train, LATER, arms=("longer", "upcycled"), overrides={START: "/tmp/mine"})
    assert train.starts == ["/tmp/mine"] * 2
    assert operated == []


def test_results_that_have_moved_are_the_same_results(fake_run, tmp_path):
    fake_run(arms=("dense",))
    before = fake_run(experiment=LATER)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    train = Seen()
    after = run_made_up(tmp_path / "elsewhere", train, LATER)
    assert train.calls == []
    assert after.rows == before.rows  # with the digests of their configs


def test_a_start_of_another_experiment_in_the_same_place_is_refused(fake_run, tmp_path):
    fake_run(arms=("dense",))
    fake_run(experiment=LATER)
    cells = make_cells(LATER, Options("smoke", results=str(tmp_path / "runs")))
    path = cells[1].workdir / workdirs.CONFIG
    config = json.loads(path.read_text())
    config["train"]["start_from"] = str(tmp_path / "runs/models-smoke/gshard_2b/seed0")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds a run with train\.start_from='.*gshard_2b/seed0'"):
        fake_run(experiment=LATER)


def test_a_start_that_was_trained_anew_is_refused(fake_run, tmp_path):
    fake_run(arms=("dense",))
    fake_run(experiment=LATER)
    path = tmp_path / "runs/models-smoke/dense_2b/seed0/evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": 1.0}))
    with pytest.raises(ValueError, match=r"train\.start_from was a model of loss .* one of 1\.0"):
        fake_run(experiment=LATER)


def test_flops_are_counted_with_and_without_those_of_the_start(fake_run):
    fake_run(arms=("dense",))
    comparison = fake_run(experiment=LATER, report=True)
    fresh, longer, upcycled = comparison.rows
    assert [fresh["flops_before"], longer["flops_before"]] == [None, longer["training_flops"]]
    assert fresh["total_training_flops"] == fresh["training_flops"] == longer["training_flops"] * 2
    assert longer["total_training_flops"] == fresh["total_training_flops"]
    sequences = 8 * 4
    assert upcycled["training_flops"] == upcycled["flops_per_sequence"] * sequences
    start = longer["training_flops"]
    assert upcycled["total_training_flops"] == start + upcycled["training_flops"]


def test_equal_flops_in_all_are_a_rule(fake_run):
    fake_run(arms=("dense",))
    rule = Equal("total_training_flops", ("fresh", "longer"), 0.0)
    fake_run(experiment=dataclasses.replace(LATER, equal=(rule,)))
    rule = Equal("training_flops", ("fresh", "longer"), 0.01)
    with pytest.raises(ValueError, match=r"unfair: training FLOPs of fresh .* and longer"):
        fake_run(experiment=dataclasses.replace(LATER, equal=(rule,)))
    undeclared = dataclasses.replace(LATER, may_differ=("name", "model.", "train.steps"))
    with pytest.raises(ValueError, match=r"train\.start_from is None in fresh and 'table1/dense'"):
        fake_run(experiment=undeclared)


def test_numbers_may_follow_from_the_scale():
    """As the steps do that make equal FLOPs in all; --set has the last word."""
    arm = upcycling.FRESH_IN_ALL
    steps = {scale: arm.run_config(scale, 0).train.steps for scale in ("smoke", "demo")}
    assert steps == {"smoke": round(8 * (35.39 / 46.01 + 0.25)), "demo": 515}
    assert arm.run_config("demo", 0, {"train.steps": 7}).train.steps == 7
    options = Options("demo", arms=(arm.slug,))
    (planned,) = plan_arms(upcycling.EXPERIMENT, options, Hardware("h100"))
    assert "--config.train.steps=515" in planned.command


def test_plans_print_the_surgery_and_the_start():
    options = Options("smoke", results="here/runs")
    hardware = Hardware("h100")
    planned = plan_arms(LATER, options, hardware)
    upcycled = planned[2]
    first, second = map(shlex.split, upcycled.preparation)
    assert first[:5] == [
        "python", "-m", "dsmoe_jax", "surgery", "upcycle",
    ]  # fmt: skip
    dense = "here/runs/models-smoke/dense_2b/seed0"
    made = second[5].removeprefix("--from=")
    assert first[5:7] == [f"--from={dense}", f"--to={made}"]
    assert {"--moments=none", "--copies=16", "--tied=True"} <= set(first)
    to = second[6].removeprefix("--to=")
    assert f"--config.train.start_from={to}" in upcycled.command
    assert f"--config.train.start_from={dense}" in planned[1].command
    notes = plan_tables.notes(LATER, options, hardware, planned)
    assert any("Finished runs of experiments.v1.table1 are needed first" in line for line in notes)
    assert notes[-1].splitlines()[1].strip() == upcycled.preparation[0]


def test_fine_tuning_reads_text_in_the_tokens_of_its_start(fake_run, tmp_path):
    fake_run(arms=("deepseekmoe", "dense"))
    asked = []

    class Reads(FakeTrain):
        def __call__(self, config, workdir):
            asked.append((config.train.start_from, config.data.tokenizer))
            super().__call__(config, workdir)

    fake_run(Reads(), fine_tuning.EXPERIMENT)
    mixture, dense = (
        tmp_path / f"runs/models-smoke/{name}/seed0" for name in ("dsmoe_2b", "dense_2b")
    )
    tokenizer = str(mixture / workdirs.TOKENIZER)
    assert asked == [(str(mixture), tokenizer)] * 3 + [(str(dense), tokenizer)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained": "Dnse"}, r"table1: arm 'Dnse': must be one of"),
        ({"operations": (("cut", {}),)}, r"operation 'cut': must be one of upcycle"),
        ({"operations": (("upcycle", {}),)}, r"--copies: missing; Copies of each FFN"),
        ({"operations": (("upcycle", {"copies": 2, "keep": 3}),)}, r"--keep=3: has no meaning for"),
        ({"experiment": fig5.EXPERIMENT, "trained": "GShard"}, r"fig5: arm 'GShard': is a probe"),
    ],
)
def test_what_cannot_be_made_is_refused_when_the_experiment_is_built(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DENSE, **change)
