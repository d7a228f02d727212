"""Checkpoints that stay: the newest, every so many steps, and those of the lowest held-out loss."""

import shutil

import pytest

from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.rows import steps_of_lowest_loss
from tests.training.test_loop import assert_same_run, numbers

pytestmark = pytest.mark.usefixtures("shared_steps")
LOSSES = {2: 5.0, 4: 3.0, 6: 3.5, 8: 4.0, 10: 4.5}
EVALUATED = {"train.eval_every": 2, "train.eval_batches": 1, "train.keep_checkpoints": 1}


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture
def made_up_losses(monkeypatch):
    """Held-out losses by step."""
    original = HeldOut.measure

    def measure(self, params, other, on_batch=lambda done: None, name="validation"):
        result = original(self, params, other, on_batch, name)
        return result | {"loss": LOSSES[int(name.removeprefix("validation-"))]}

    monkeypatch.setattr(HeldOut, "measure", measure)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"train.keep_best": 1}, [4, 10]),
        ({"train.keep_best": 2}, [4, 6, 10]),
        ({"train.keep_every": 4}, [4, 8, 10]),
        ({"train.keep_every": 5, "train.keep_best": 1, "train.keep_checkpoints": 2}, [4, 5, 9, 10]),
    ],
)
def test_they_stay(tiny_config, tmp_path, made_up_losses, keep, kept):
    """Checkpoints are also made where `keep_every` says, and at each evaluation."""
    config = tiny_config(**{**EVALUATED, "train.checkpoint_every": 9, **keep})
    train(config, tmp_path / "run", progress=False)
    assert steps_of(tmp_path / "run") == kept
    assert [load_run(tmp_path / "run", step).step for step in kept] == kept
    with pytest.raises(ValueError, match=r"--step=1: no such checkpoint; there are \[4, "):
        load_run(tmp_path / "run", 1)


def test_a_run_that_goes_on_still_knows_the_best(tiny_config, tmp_path, made_up_losses):
    """It was stopped behind the best step, whose loss is in its log."""
    config = tiny_config(**EVALUATED, **{"train.keep_best": 1, "train.checkpoint_every": 100})
    undisturbed = tmp_path / "undisturbed"
    train(config, undisturbed, progress=False)
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    (workdir / "evaluation.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "10")  # from step 4 on again
    assert train(config, workdir, progress=False).resumed_from == 4
    assert steps_of(workdir) == steps_of(undisturbed) == [4, 10]
    assert_same_run(workdir, undisturbed)


def test_they_change_no_number(finished_run, tiny_config, tmp_path):
    keep = {"train.keep_best": 1, "train.keep_every": 2}
    train(tiny_config(**keep), tmp_path / "run", progress=False)
    assert numbers(tmp_path / "run") == numbers(finished_run[0])
    assert {2, 4, 6, 8, 10} <= set(steps_of(tmp_path / "run"))


def test_they_may_change_on_the_way(finished_run, tiny_config, tmp_path):
    workdir = shutil.copytree(finished_run[0], tmp_path / "run")
    keep = {"train.keep_best": 1, "train.keep_every": 2}
    assert train(tiny_config(**keep), workdir, progress=False).resumed_from == 10


def test_of_two_as_good_the_later_is_better():
    rows = [{"step": step, "validation_loss": loss} for step, loss in LOSSES.items()]
    rows += [{"step": 12, "validation_loss": 3.0}, {"step": 13, "loss": 1.0}]
    assert steps_of_lowest_loss(rows) == [12, 4, 6, 8, 10, 2]


def test_the_best_of_one_evaluation_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"train\.keep_best=1: needs train\.eval_every"):
        tiny_config(**{"train.keep_best": 1, "train.eval_every": None})
