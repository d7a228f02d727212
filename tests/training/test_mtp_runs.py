"""Runs with multi-token prediction: interrupted and gone on with, and replayed."""

import chex
import pytest

from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training.loop import train
from tests.tools.trees import REORDERED
from tests.training.test_loop import numbers, parameters

CONFIG = {
    "model.num_hidden_layers": 1,
    "model.mtp.num_nextn_predict_layers": 1,
    "model.moe.router.bias_update_speed": 0.01,
    "train.schedule_steps": 8,
    "train.checkpoint_every": 4,
    "train.eval_every": None,
    "train.record_routing": True,
}


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory):
    """A run of eight steps."""
    workdir = tmp_path_factory.mktemp("mtp") / "run"
    train(tiny_config(**CONFIG, **{"train.steps": 8}), workdir, progress=False)
    return workdir


def test_four_steps_and_four_are_eight(whole, tiny_config, tmp_path):
    """Every number of every row, and every bit of the parameters and of the biases."""
    workdir = tmp_path / "run"
    train(tiny_config(**CONFIG, **{"train.steps": 4}), workdir, progress=False)
    result = train(tiny_config(**CONFIG, **{"train.steps": 8}), workdir, progress=False)
    assert result.resumed_from == 4
    rows = [[row for row in numbers(run) if "loss" in row] for run in (workdir, whole)]
    assert all("mtp_loss" in row for row in rows[0])
    for found, wanted in zip(*rows, strict=True):
        common = found.keys() & wanted.keys()  # evaluations come after the last step of a run
        assert {k: found[k] for k in common} == {k: wanted[k] for k in common}
    chex.assert_trees_all_equal(parameters(workdir), parameters(whole))


def test_its_routing_is_replayed(whole, tiny_config, tmp_path):
    """Routing of the module too: other experts there would give another loss."""
    replays = {
        **CONFIG,
        "train.steps": 8,
        "train.record_routing": False,
        "model.moe.router.name": "replay_ids",
        "model.moe.router.bias_update_speed": None,
        "train.replay_routing": str(whole / "routing"),
    }
    train(tiny_config(**replays), tmp_path / "run", progress=False)
    keys = ("loss", "mtp_loss", "grad_norm", "load")
    found, wanted = (
        [{k: r[k] for k in keys if k in r} for r in read_rows(d)] for d in (tmp_path / "run", whole)
    )
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        chex.assert_trees_all_close(a, b, rtol=REORDERED)
