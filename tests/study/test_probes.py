"""Arms that are probes: measurements of models which another experiment trained."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_runs import FakeTrain

from dsmoe_jax.model.size import count_parameters
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.report import plots
from dsmoe_jax.study import probes, runner
from dsmoe_jax.study.experiment import ProbeArm
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.readings import Outcome
from experiments.v1 import fig4, fig5, table1

LEVEL = {"GShard": 5.0}


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """Workdirs whose models were loaded; made-up runs have no checkpoints."""
    found = []

    def load(workdir, step, corpus):
        config = json.loads((workdir / "config.json").read_text())
        assert step == config["train"]["steps"]
        found.append(workdir)
        return SimpleNamespace(name=config["name"], step=step)

    monkeypatch.setattr(runner, "load_run", load)
    return found


def made_up(run, intervention):
    """A loss of 4.9 with all 7 experts, 0.1 more for each that is missing."""
    k = intervention.num_experts_per_tok
    loss = LEVEL["GShard"] if k is None else 4.9 + 0.1 * (7 - k)
    return {"loss": loss, "bits_per_byte": 0.4 * loss, "tokens": 1000, "domains": {}}


def without_models(experiment):
    arms = tuple(dataclasses.replace(arm, probe=made_up) for arm in experiment.arms)
    return dataclasses.replace(experiment, arms=arms)


FIG5 = without_models(fig5.EXPERIMENT)


def test_probes_measure_what_another_experiment_trained(fake_run, tmp_path, loaded):
    fake_run(seeds=2)
    train = FakeTrain()
    comparison = fake_run(train, FIG5, seeds=2)
    assert train.calls == []
    runs = tmp_path / "runs/models-smoke"
    names = ["gshard_2b"] + ["dsmoe_2b"] * 5
    assert loaded == [runs / name / f"seed{seed}" for seed in (0, 1) for name in names]
    losses = comparison.by_seed("validation_loss")
    assert losses["4 of 7"] == {0: pytest.approx(5.2), 1: pytest.approx(5.2)}
    rows = {row.arm: row for row in comparison.rows}
    assert rows["3 of 7"]["activated"] < rows["7 of 7"]["activated"]
    assert rows["3 of 7"]["total"] == rows["7 of 7"]["total"]
    assert rows["3 of 7"]["maxvio_running"] is None


def test_what_was_measured_is_not_measured_again(fake_run, loaded):
    fake_run()
    first = fake_run(experiment=FIG5)
    del loaded[:]
    assert fake_run(experiment=FIG5).rows == first.rows
    assert loaded == []


def test_a_measurement_from_before_interventions_had_a_field_stays(fake_run, loaded, tmp_path):
    fake_run()
    fake_run(experiment=FIG5)
    (path,) = (tmp_path / "runs").glob("fig5-smoke/gshard/seed0.json")
    record = json.loads(path.read_text())
    del record["probed"]["tokens_alone"]
    path.write_text(json.dumps(record))
    del loaded[:]
    fake_run(experiment=FIG5)
    assert loaded == []


def test_models_that_are_not_there_are_named_with_the_command_that_trains_them(fake_run, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"models-smoke/gshard_2b/seed0: holds no finished run, which GShard, seed 0 measures;"
        r" train it with python -m experiments\.v1\.table1 --scale=smoke --seeds=1$",
    ):
        fake_run(experiment=FIG5, seeds=1)
    assert not (tmp_path / "runs/fig5-smoke").exists()
    assert not any(row.finished for row in fake_run(experiment=FIG5, report_only=True).rows)


def test_a_measurement_of_a_run_that_was_made_anew_is_refused(fake_run, tmp_path):
    fake_run()
    fake_run(experiment=FIG5)
    path = tmp_path / "runs/models-smoke/gshard_2b/seed0/evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": 1.0}))
    with pytest.raises(ValueError, match=r"gshard/seed0: measured .* here it is .*'loss': 1\.0"):
        fake_run(experiment=FIG5)


def test_a_model_of_another_config_is_another_model(fake_run):
    fake_run()
    with pytest.raises(ValueError, match=r"gshard_2b-.*/seed0: holds no finished run, which GShar"):
        fake_run(experiment=FIG5, overrides={"train.steps": 4})


@pytest.mark.parametrize(
    ("file", "key", "values"),
    [
        ("seed0/evaluation.json", "step", (8, 6)),
        ("seed0/evaluation.json", "tokens", (1000, 999)),
        ("seed0.json", "data_fingerprint", ("ab" * 32, "cd" * 32)),
    ],
)
def test_models_of_another_step_or_text_are_refused_before_any_is_measured(
    fake_run, tmp_path, loaded, file, key, values
):
    fake_run()
    path = tmp_path / "runs/models-smoke/dsmoe_2b" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: values[1]}))
    name = "validation_tokens" if key == "tokens" else key
    with pytest.raises(
        ValueError,
        match=rf"fig5: unfair: {name} is {values[0]} in .*/gshard_2b/seed0, which GShard, seed 0"
        rf" measures, and {values[1]} in .*dsmoe_2b/seed0, which 3 of 7, seed 0 measures",
    ):
        fake_run(experiment=FIG5)
    assert loaded == []


def test_models_of_a_corpus_that_has_changed_are_refused(fake_run, loaded):
    fake_run()
    with pytest.raises(
        ValueError,
        match=r"fig5: unfair: .*gshard_2b/seed0, which GShard, seed 0 measures, was trained on data"
        r" abababababab, the corpus is cdcdcdcdcdcd now",
    ):
        fake_run(experiment=FIG5, fingerprint="cd" * 32)
    assert loaded == []


def test_a_model_without_the_checkpoint_of_its_evaluation_is_refused(fake_run, tmp_path, loaded):
    fake_run()
    checkpoints = tmp_path / "runs/models-smoke/dsmoe_2b/seed0/checkpoints"
    for step in ("4", "6"):
        (checkpoints / step).mkdir(parents=True)
    with pytest.raises(
        ValueError,
        match=r"dsmoe_2b/seed0 was evaluated at step 8, but the checkpoints that 3 of 7, seed 0"
        r" could measure are of steps \[4, 6\]",
    ):
        fake_run(experiment=FIG5)
    assert loaded == []
    (checkpoints / "8").mkdir()
    assert all(row.finished for row in fake_run(experiment=FIG5).rows)


def test_held_out_is_measured_as_after_training(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        probes, "evaluate", lambda *positional, **named: asked.update(named, positional=positional)
    )
    config = table1.EXPERIMENT.arms[4].run_config("smoke", 0, {"train.accumulation_steps": 2})
    intervention = Intervention(mask_best=4)
    run = SimpleNamespace(config=config, model="model", corpus="corpus", step=config.train.steps)
    probes.held_out(run, intervention)
    assert asked == {
        "positional": ("model", "corpus"),
        "batch_size": 2,
        "max_batches": 2,
        "intervention": intervention,
    }


def test_of_a_run_in_stages_the_last_one_is_measured(monkeypatch):
    """Its activated experts, and its batches; K of the intervention takes the place of its own."""
    stages = {
        "train.stages.share": (0.5, 0.5),
        "train.stages.train.global_batch_size": (8, 2),
        "train.stages.model.moe.num_experts_per_tok": (3, 15),
    }
    arm = fig5.EXPERIMENT.arms[1]
    config = arm.run_config("smoke", 0, stages)
    measured = arm.measured_config(config)
    assert measured.model.moe.num_experts_per_tok == arm.intervention.num_experts_per_tok
    assert measured.train.stages is None
    by_hand = count_parameters(measured.model).activated
    outcome = Outcome(config, measured, evaluation={})
    assert MEASURES["activated"].read(outcome) == by_hand
    steps, length = config.train.steps, config.data.sequence_length
    assert MEASURES["tokens"].read(outcome) == steps // 2 * (8 + 2) * length
    sizes = []
    monkeypatch.setattr(probes, "evaluate", lambda *_, batch_size, **__: sizes.append(batch_size))
    run = SimpleNamespace(config=config, model="model", corpus="corpus", step=steps)
    probes.held_out(run, arm.intervention)
    assert sizes == [2]


def test_the_picture_has_a_line_a_model_and_a_level_line(fake_run):
    fake_run()
    figure = plots.draw(fake_run(experiment=FIG5))["over_x"]
    (ax,) = figure.axes
    line, level = ax.lines
    np.testing.assert_allclose(line.get_xydata(), [(k, 4.9 + 0.1 * (7 - k)) for k in range(3, 8)])
    assert set(level.get_ydata()) == {5.0}
    assert [text.get_text() for text in ax.texts] == ["DeepSeekMoE", "GShard"]
    assert ax.get_xlabel() == "routed experts activated"


def test_masks_of_figure_4_are_the_same_share_of_both_models():
    masks = {arm.label: arm.intervention.mask_best for arm in fig4.EXPERIMENT.arms}
    assert masks["GShard x1.5, 3/16"] == 3
    assert masks["DeepSeekMoE, 3/16"] == 12


def test_an_arm_that_the_other_experiment_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"table1: arm 'GShrd': must be one of"):
        ProbeArm("x", table1.EXPERIMENT, "GShrd")
