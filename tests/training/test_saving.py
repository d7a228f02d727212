"""Checkpoints as often as a share of the time allows; a run that goes on with other hardware."""

import shutil

import pytest

from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_config
from dsmoe_jax.training import saving
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.saving import SaveTimer
from tests.training.test_loop import assert_same_run

pytestmark = pytest.mark.usefixtures("shared_steps")


class Clock:
    """A clock that stands still until it is told."""

    time = 100.0

    def __call__(self) -> float:
        return self.time


def test_saving_takes_the_share():
    """Costs of 2 to 5 seconds, steps of half a second: in the long run a tenth of the time."""
    clock, stood_still, saves = Clock(), 0.0, 0
    timer = SaveTimer(0.1, clock)
    assert timer.is_due()  # the first one tells the cost
    for step in range(10_000):
        clock.time += 0.5
        if timer.is_due():
            cost = 2 + step % 4
            clock.time += cost
            timer.saved(cost)
            stood_still, saves = stood_still + cost, saves + 1
    assert saves > 100
    # The time of a cost is not counted in the interval that follows it: 0.1 of 1 + 0.1.
    assert stood_still / (clock.time - 100) == pytest.approx(0.1 / 1.1, rel=0.02)


def test_without_a_share_never():
    timer = SaveTimer(None)
    timer.saved(0.0)
    assert not timer.is_due()


def test_more_checkpoints_change_nothing(finished_run, tiny_config, tmp_path, monkeypatch):
    """Due all the time: it is heard when a step is waited for, so behind every second one.

    At step 5 there is an evaluation, after which it is heard once more.
    """
    monkeypatch.setattr(saving, "SaveTimer", lambda share: SaveTimer(share, Clock()))
    config = tiny_config(
        **{"train.checkpoint_share": 0.5, "train.checkpoint_every": 99, "train.keep_checkpoints": 9}
    )
    monkeypatch.setattr(SaveTimer, "saved", lambda self, seconds: None)
    train(config, tmp_path / "run", progress=False)
    there = sorted(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert there == [2, 4, 5, 6, 8, 10]
    assert_same_run(tmp_path / "run", finished_run[0])


def test_fewer_devices_by_the_same_command(finished_run, tiny_config, tmp_path, capsys):
    """It was on two devices; one is left, which takes twice as many micro-batches."""
    workdir = shutil.copytree(finished_run[0], tmp_path / "run")
    (workdir / "evaluation.json").unlink()
    shutil.rmtree(workdir / "checkpoints/10")
    config = tiny_config(
        **{"mesh.data": 2, "mesh.fallbacks": ("data=1,accumulation_steps=2", "data=1")}
    )
    assert train(config, workdir).resumed_from == 9
    said = capsys.readouterr().err
    assert "mesh.fallbacks: train.accumulation_steps=2 (was 1), mesh.data=1 (was 2)" in said
    losses, wanted = ([r["loss"] for r in read_rows(w)] for w in (workdir, finished_run[0]))
    assert read_config(workdir).train.accumulation_steps == 2
    assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model.moe.drop.capacity_factor": 1.5}, "the tokens of a micro-batch compete"),
        (
            {"train.stages": {"share": (0.5, 0.5), "train.accumulation_steps": (1, 2)}},
            "stages change it",
        ),
    ],
)
def test_micro_batches_that_would_be_another_run(changes, why, tiny_config, tmp_path):
    config = tiny_config(
        **{"mesh.data": 2, "mesh.fallbacks": ("data=1,accumulation_steps=2",), **changes}
    )
    with pytest.raises(ValueError, match=rf"mesh.fallbacks=.*would be another run: {why}"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
