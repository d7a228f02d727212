"""Cells in the runner: order, skipping, continuing, refusing."""

import dataclasses
import importlib
import json
import pathlib
import re

import pytest
from made_up_runs import FakeTrain, run_made_up

from dsmoe_jax.commands import experiment as command
from dsmoe_jax.report import plots
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.study import results, runner
from dsmoe_jax.study.cells import Options, make_cells
from dsmoe_jax.study.experiment import Arm, Equal, same_activated
from dsmoe_jax.training import loop
from experiments.v1 import fig3, table1
from tests.tools import compiling

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "experiments").glob("*/*.py")
    if not path.stem.startswith("_")
)
EXPERIMENTS = [importlib.import_module(name).EXPERIMENT for name in MODULES]
NAMES = ["dense_2b", "hash_2b", "switch_2b", "gshard_2b", "dsmoe_2b"]


def test_first_seed_of_every_arm_comes_first(fake_run):
    train = FakeTrain()
    fake_run(train, seeds=2)
    assert train.calls == [(name, seed) for seed in (0, 1) for name in NAMES]


def test_finished_runs_are_skipped_and_the_results_are_the_same(fake_run, tmp_path):
    before = fake_run(FakeTrain(), seeds=1)
    text = (tmp_path / "runs/table1-smoke/results.jsonl").read_text()
    train = FakeTrain()
    after = fake_run(train, seeds=1)
    assert train.calls == []
    assert after.rows == before.rows
    assert (tmp_path / "runs/table1-smoke/results.jsonl").read_text() == text


def test_interrupted_experiment_continues_with_the_interrupted_run(fake_run):
    with pytest.raises(KeyboardInterrupt):
        fake_run(FakeTrain(stop_after=3), seeds=2)
    train = FakeTrain()
    comparison = fake_run(train, seeds=2)
    assert train.calls == [(n, 0) for n in NAMES[2:]] + [(n, 1) for n in NAMES]
    assert all(row.finished for row in comparison.rows)


def test_more_seeds_later_train_only_the_new_ones(fake_run):
    fake_run(FakeTrain(), seeds=1)
    train = FakeTrain()
    fake_run(train, seeds=2)
    assert train.calls == [(name, 1) for name in NAMES]


def test_arms_are_chosen_by_label_or_directory_name(fake_run):
    train = FakeTrain()
    fake_run(train, arms=("hash_layer", "DeepSeekMoE"))
    assert train.calls == [("hash_2b", 0), ("dsmoe_2b", 0)]
    with pytest.raises(ValueError, match=r"--arms=gshrd: no such arm; there are dense, hash_layer"):
        fake_run(arms=("gshrd",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.moe.n_routed_experts": 20},
            r"total parameters of Hash Layer \([\d,]+\) and DeepSeekMoE \([\d,]+\) differ by"
            r" [\d.]+ %; at most 2 % is allowed",
        ),
        (
            {"model.moe.num_experts_per_tok": 9},
            r"activated parameters of GShard \([\d,]+\) and DeepSeekMoE \([\d,]+\) differ by",
        ),
        (
            {"model.moe.nominal_width": 0.3},
            r"FLOPs per sequence of GShard \([\d,]+\) and DeepSeekMoE \([\d,]+\) differ",
        ),
        ({"train.steps": 9}, r"train.steps is 8 in Dense and 9 in DeepSeekMoE; arms may differ"),
        ({"data.domains": ["x"]}, r"data.domains is None in Dense and \('x',\) in DeepSeekMoE"),
    ],
)
def test_unfair_arms_are_refused_before_training(fake_run, tmp_path, change, message):
    *others, last = table1.EXPERIMENT.arms
    unfair = dataclasses.replace(
        table1.EXPERIMENT, arms=(*others, dataclasses.replace(last, overrides=change))
    )
    train = FakeTrain()
    with pytest.raises(ValueError, match="table1: unfair: " + message):
        fake_run(train, unfair)
    assert train.calls == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.steps": 9}, r"tokens would be 2048 in Dense and 2304 in DeepSeekMoE"),
        ({"train.global_batch_size": 2}, r"tokens would be 2048 in Dense and 1024"),
        ({"train.eval_batches": 3}, r"validation_tokens would be 512 in Dense and 768 in"),
        ({"train.eval_batches": None}, r"validation_tokens would be 512 in Dense and all in"),
    ],
)
def test_other_numbers_of_tokens_are_refused_before_training(fake_run, change, message):
    """Even in experiments whose arms may differ in the settings from which they follow."""
    *others, last = table1.EXPERIMENT.arms
    may_differ = (*table1.EXPERIMENT.may_differ, *change)
    unfair = dataclasses.replace(
        table1.EXPERIMENT,
        arms=(*others, dataclasses.replace(last, overrides=change)),
        may_differ=may_differ,
    )
    train = FakeTrain()
    with pytest.raises(ValueError, match="table1: unfair: " + message):
        fake_run(train, unfair)
    assert train.calls == []


@pytest.mark.parametrize(("later", "fair"), [(11, True), (12, False)])
def test_arms_in_stages_are_compared_by_means_over_their_tokens(fake_run, later, fair):
    """Half of the steps with 3 experts and half with 11 are as fair as 7 throughout."""
    plain = table1.EXPERIMENT.arms[4]
    stages = {
        "train.stages.share": (0.5, 0.5),
        "train.stages.model.moe.num_experts_per_tok": (3, later),
    }
    staged = dataclasses.replace(plain, label="staged", overrides=stages)
    experiment = dataclasses.replace(
        table1.EXPERIMENT,
        arms=(plain, staged),
        equal=same_activated(plain.label, staged.label),
        claims=(),
        may_differ=("train.stages", "train.stages."),
    )
    if fair:
        comparison = fake_run(experiment=experiment, report=True)
        row = comparison.rows[1]
        assert row["activated"] == comparison.rows[0]["activated"]
    else:
        with pytest.raises(ValueError, match=r"unfair: activated .* differ by"):
            fake_run(experiment=experiment)


def test_a_run_of_another_config_is_refused_and_nothing_is_lost(fake_run, tmp_path):
    """A config file has changed since: the name is the same."""
    fake_run(seeds=1)
    run = tmp_path / "runs/models-smoke/gshard_2b/seed0"
    before = (run / "metrics.jsonl").read_bytes()
    config = json.loads((run / "config.json").read_text())
    config["train"]["steps"] = 9
    (run / "config.json").write_text(json.dumps(config))
    train = FakeTrain()
    with pytest.raises(ValueError, match=r"holds a run with train.steps=9, here it is 8"):
        fake_run(train)
    assert train.calls == []
    assert (run / "metrics.jsonl").read_bytes() == before


def test_other_overrides_are_other_models_beside_the_first(fake_run, tmp_path):
    fake_run(seeds=1)
    train = FakeTrain()
    fake_run(train, overrides={"train.steps": 4})
    assert [name for name, _ in train.calls] == NAMES
    names = {path.name for path in (tmp_path / "runs/models-smoke").iterdir()}
    assert names >= set(NAMES)
    assert len(names) == 2 * len(NAMES)


def test_what_may_change_in_a_run_makes_no_other_model(fake_run):
    fake_run(seeds=1)
    train = FakeTrain()
    fake_run(train, overrides={"train.log_every": 3, "mesh.expert": 1})
    assert train.calls == []


def test_experiments_share_the_models_that_they_have_in_common(fake_run, tmp_path):
    fake_run(seeds=2)
    train = FakeTrain()
    comparison = fake_run(train, fig3.EXPERIMENT, seeds=2)
    assert not {"gshard_2b", "dsmoe_2b"} & {name for name, _ in train.calls}
    assert all(row.finished for row in comparison.rows)
    assert (tmp_path / "runs/fig3-smoke/results.jsonl").exists()


def test_arms_with_one_workdir_have_one_config():
    """The digest in the name tells all models of all experiments apart."""
    configs = {}
    for experiment in EXPERIMENTS:
        for cell in make_cells(experiment, Options("smoke", seeds=1)):
            if cell.trained is None:
                assert configs.setdefault(cell.workdir, cell.config) == cell.config
    assert len(configs) > 20


def test_a_run_that_another_process_holds_is_left_to_it(fake_run, capsys):
    class Held(FakeTrain):
        def __call__(self, config, workdir):
            if config.name == "switch_2b":
                raise workdirs.InUse("in use by process 7")
            super().__call__(config, workdir)

    comparison = fake_run(Held())
    assert [row.finished for row in comparison.rows] == [True, True, False, True, True]
    assert comparison.failed == []
    assert "Switch, seed 0: another process is at it" in capsys.readouterr().err


def test_a_run_that_another_process_has_finished_meanwhile_is_not_made_again(fake_run, tmp_path):
    class Helped(FakeTrain):
        def __call__(self, config, workdir):
            if not self.calls:
                run_made_up(tmp_path / "runs", FakeTrain(), arms=("hash_layer",))
            super().__call__(config, workdir)

    train = Helped()
    assert all(row.finished for row in fake_run(train).rows)
    assert [name for name, _ in train.calls] == ["dense_2b", "switch_2b", "gshard_2b", "dsmoe_2b"]


def test_one_cell_is_one_task_of_an_array(fake_run):
    made = []
    for cell in range(10):
        train = FakeTrain()
        comparison = fake_run(train, seeds=2, cell=cell)
        made += train.calls
    assert made == [(name, seed) for seed in (0, 1) for name in NAMES]
    assert all(row.finished for row in comparison.rows)
    with pytest.raises(ValueError, match=r"--cell=10: must be 0 to 9, the number of a run"):
        fake_run(seeds=2, cell=10)
    with pytest.raises(ValueError, match=r"--cell=1: one run, which has no --minutes"):
        fake_run(cell=1, minutes=3)


class Slow(FakeTrain):
    """Every run takes a minute of a clock that stands still otherwise."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now = 0.0
        monkeypatch.setattr(runner.time, "monotonic", lambda: self.now)

    def __call__(self, config, workdir):
        self.now += 60
        super().__call__(config, workdir)


@pytest.mark.parametrize(
    ("minutes", "most", "seeds"),
    [(1, None, 1), (9.9, None, 1), (10, None, 2), (16, None, 3), (99, 2, 2)],
)
def test_as_many_seeds_as_fit_into_the_minutes(fake_run, monkeypatch, capsys, minutes, most, seeds):
    train = Slow(monkeypatch)
    comparison = fake_run(train, minutes=minutes, seeds=most)
    assert train.calls == [(name, seed) for seed in range(seeds) for name in NAMES]
    assert {row.seed for row in comparison.rows} == set(range(seeds))
    said = capsys.readouterr().err
    if most is None:
        assert f"{seeds} seed{'s' if seeds > 1 else ''} in {5 * seeds} min of {minutes:g}" in said
        assert f"one more takes about 5 min: --seeds={seeds + 1} instead of --minutes" in said


def test_seeds_that_are_there_cost_no_minutes(fake_run, monkeypatch):
    fake_run(Slow(monkeypatch), seeds=2)
    train = Slow(monkeypatch)
    assert {row.seed for row in fake_run(train, minutes=5).rows} == {0, 1, 2}
    assert train.calls == [(name, 2) for name in NAMES]


def test_no_time_is_refused(fake_run):
    with pytest.raises(ValueError, match=r"--minutes=0: must be above 0"):
        fake_run(minutes=0.0)


def test_a_failure_of_any_kind_is_written_down_and_tried_again(fake_run, tmp_path):
    class Fails(FakeTrain):
        def __call__(self, config, workdir):
            if config.name == "hash_2b":
                raise RuntimeError("out of memory")
            super().__call__(config, workdir)

    comparison = fake_run(Fails(), report=True)
    assert [(row.arm, row.failed) for row in comparison.failed] == [("Hash Layer", "out of memory")]
    report = (tmp_path / "runs/table1-smoke/report.md").read_text()
    assert "Failed, so not in these numbers: Hash Layer (seed 0): out of memory" in report
    rows = results.load_rows(tmp_path / "runs/table1-smoke/results.jsonl")
    assert rows[1].failed == "out of memory"
    train = FakeTrain()
    again = fake_run(train)
    assert train.calls == [("hash_2b", 0)]
    assert again.failed == []


def test_a_full_disk_ends_the_experiment(fake_run):
    class Full(FakeTrain):
        def __call__(self, config, workdir):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fake_run(Full())


def test_changed_corpus_is_refused(fake_run):
    with pytest.raises(KeyboardInterrupt):
        fake_run(FakeTrain(stop_after=3), seeds=1)
    train = FakeTrain()
    with pytest.raises(ValueError, match=r"unfair: Dense, seed 0 was trained on data abab.* now"):
        fake_run(train, fingerprint="cd" * 32)
    assert train.calls == []


def test_a_corpus_may_move_but_not_change(fake_run, tmp_path):
    fake_run(overrides={"data.corpus": "texts"})
    train = FakeTrain()
    fake_run(train, overrides={"data.corpus": str(tmp_path / "moved")})
    other = {"data.corpus": str(tmp_path / "other")}
    for options in ({}, {"report_only": True}):
        with pytest.raises(ValueError, match=r"unfair: Dense, seed 0 was trained on data abab"):
            fake_run(train, fingerprint="cd" * 32, overrides=other, **options)
    (tmp_path / "runs/models-smoke/dense_2b/seed0.json").unlink()  # that says which data it was
    with pytest.raises(
        ValueError, match=r"dense_2b/seed0: holds a run with data\.corpus='.*texts'"
    ):
        fake_run(train, overrides=other)
    assert train.calls == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("seed0.json", b'{"data_finger', r"seed0\.json: not JSON"),
        ("seed0.json", b"[" * 200_000, r"seed0\.json: not JSON"),
        ("seed0.json", b"[]", r"seed0\.json: not a JSON object"),
        ("seed0.json", b'{"data_fingerprint": 3}', r"seed0\.json: data_fingerprint=3: must be a s"),
        ("seed0/evaluation.json", b'{"step": 8', r"evaluation\.json: not JSON"),
        ("seed0/evaluation.json", b'{"step": 8, "domains": {"en": {"loss": 1}}}',
         r"evaluation\.json: domains\.en\.bits_per_byte=None: must be a number"),
        ("seed0/metrics.jsonl", b'{"step": 1}\n{"step": 2, "loss": "x"}\n', r"line 2 is not a row"),
        ("seed0/config.json", b"\xff", r"config\.json: not the config of a run"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(fake_run, tmp_path, name, content, message):
    fake_run()
    (tmp_path / "runs/models-smoke/switch_2b" / name).write_bytes(content)
    train = FakeTrain()
    with pytest.raises(ValueError, match=message) as caught:
        fake_run(train)
    assert "\n" not in str(caught.value)
    assert train.calls == []


def test_records_may_have_keys_that_are_not_ours(fake_run, tmp_path):
    fake_run()
    path = tmp_path / "runs/models-smoke/switch_2b/seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": ["mine"]}))
    train = FakeTrain()
    fake_run(train)
    assert train.calls == []


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"arm": "Dense"}', b"[" * 200_000])
def test_damaged_results_are_named(tmp_path, line):
    (tmp_path / "results.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"results\.jsonl: line 1 is not a row of results: "):
        results.load_rows(tmp_path / "results.jsonl")


def test_without_a_place_for_compiled_programs_it_goes_on(fake_run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file/tmp"))
    with compiling.jax_settings(jax_compilation_cache_dir=None):
        assert all(row.finished for row in fake_run().rows)


def test_runs_judged_on_different_text_are_refused_before_training(fake_run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fake_run(FakeTrain(stop_after=4))
    path = tmp_path / "runs/models-smoke/switch_2b/seed0/evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": 999}))
    train = FakeTrain()
    with pytest.raises(
        ValueError, match=r"validation_tokens is 1000 in Dense, seed 0, and 999 in Switch, seed 0"
    ):
        fake_run(train)
    assert train.calls == []


def test_a_run_that_diverges_stays_missing_and_the_others_go_on(fake_run, tmp_path):
    class Diverges(FakeTrain):
        def __call__(self, config, workdir):
            if config.name == "switch_2b":
                self.calls.append((config.name, config.train.seed))
                raise loop.NonFinite("step 3: loss=nan; stopped")
            super().__call__(config, workdir)

    train = Diverges()
    comparison = fake_run(train)
    assert [(row.arm, row.failed) for row in comparison.failed] == [
        ("Switch", "step 3: loss=nan; stopped")
    ]
    assert [name for name, _ in train.calls] == NAMES
    rows = results.load_rows(tmp_path / "runs/table1-smoke/results.jsonl")
    assert [row.finished for row in rows] == [True, True, False, True, True]


def test_results_are_rebuilt_from_the_workdirs(fake_run, tmp_path):
    comparison = fake_run(seeds=2)
    path = tmp_path / "runs/table1-smoke/results.jsonl"
    before = path.read_bytes()
    path.write_text("nonsense")
    train = FakeTrain()
    fake_run(train, seeds=2, report_only=True)
    assert path.read_bytes() == before
    assert train.calls == []
    assert results.load_rows(path) == list(comparison.rows)


def test_a_row_says_what_was_measured(fake_run, tmp_path):
    row = fake_run().rows[4]
    evaluation = json.loads(
        (tmp_path / "runs/models-smoke/dsmoe_2b/seed0/evaluation.json").read_text()
    )
    assert row["validation_loss"] == evaluation["loss"]
    assert row["maxvio"] == pytest.approx(sum(evaluation["maxvio"]) / 2)
    assert row["tokens"] == 8 * 4 * 64
    assert row["seconds"] == pytest.approx(8 * 4 * 64 / 10_000)
    assert row.data_fingerprint == "ab" * 32
    dense = fake_run().rows[0]
    assert dense["maxvio"] is None
    assert dense["dead_experts"] is None


def test_report_only_trains_nothing_and_shows_what_is_missing(fake_run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fake_run(FakeTrain(stop_after=2), seeds=1)
    train = FakeTrain()
    comparison = fake_run(train, seeds=1, report_only=True, report=True)
    assert train.calls == []
    assert [row.finished for row in comparison.rows] == [True, False, False, False, False]
    text = (tmp_path / "runs/table1-smoke/report.md").read_text()
    assert "Not finished, so not in these numbers: Hash Layer (seed 0), Switch (seed 0)" in text


def test_no_seed_is_refused(fake_run):
    with pytest.raises(ValueError, match=r"--seeds=0: must be at least 1"):
        fake_run(seeds=0)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.steps", r"--set=train.steps: must be KEY=VALUE"),
        ("train.seed=3", r"--set=train.seed=3: seeds are 0, 1, ...; --seeds says how many"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(item, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        command.override(item)


def test_overrides_reach_every_arm_and_the_report(fake_run, tmp_path):
    comparison = fake_run(overrides={"train.steps": 4}, report=True)
    assert all(row["tokens"] == 4 * 4 * 64 for row in comparison.rows)
    assert "--set=train.steps=4" in (tmp_path / "runs/table1-smoke/report.md").read_text()


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=MODULES)
def test_every_experiment_has_its_pictures(experiment):
    for name in experiment.pictures:
        plots.plot(name)


def test_experiments_know_where_they_stand_and_their_results_do_not_collide():
    assert [experiment.module for experiment in EXPERIMENTS] == MODULES
    assert len({experiment.name for experiment in EXPERIMENTS}) == len(EXPERIMENTS)


def test_experiments_with_impossible_rules_are_refused_when_built():
    one = table1.EXPERIMENT
    with pytest.raises(ValueError, match=r"arm 'GShrd': must be one of"):
        dataclasses.replace(one, equal=(Equal("total", ("Dense", "GShrd"), 0.1),))
    with pytest.raises(ValueError, match=r"quantity 'parameters': must be one of"):
        dataclasses.replace(one, equal=(Equal("parameters", ("Dense", "GShard"), 0.1),))
    with pytest.raises(ValueError, match=r"labels must differ"):
        dataclasses.replace(one, arms=(Arm("A b", "dense_2b"), Arm("a B", "hash_2b")))


def test_workdirs_are_named_after_config_and_seed(fake_run, tmp_path: pathlib.Path):
    fake_run(seeds=1, arms=("hash_layer",))
    assert (tmp_path / "runs/models-smoke/hash_2b/seed0/config.json").exists()
