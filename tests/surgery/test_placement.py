"""Placement by loads: what it decides and how it is judged, and numbers that do not fit."""

import numpy as np
import pytest

from dsmoe_jax.runs import json_files
from dsmoe_jax.surgery import OPERATIONS, Subject, permutation, placement
from tests.tools.tiny import tiny

GROUPS = {"model.moe.router.n_group": 4, "model.moe.router.topk_group": 2}
DROP = {
    "model.moe.expert_groups": 2,
    "model.moe.drop": {"policy": "device", "capacity_factor": 1.0, "protected_share": 0.1},
}


def config_of(**overrides):
    return tiny(**{"model.moe.n_routed_experts": 8, "model.num_hidden_layers": 1, **overrides})


def options(tmp_path, *rows, **changed):
    """Options with a log of these loads, a row a step."""
    text = [json_files.dumps({"step": i + 1, "load": [load_E]}) for i, load_E in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    own = {name: option.default for name, option in OPERATIONS["place"].options.items()}
    return own | {"loads": str(tmp_path / "metrics.jsonl"), "devices": 4} | changed


EVEN = [[1, 1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("changed", "overrides", "message"),
    [
        ({"devices": 1}, {}, r"--devices=1: must be at least 2; on one there is no choice"),
        ({"devices": 16}, {}, r"--devices=16: must not exceed the 8 experts of a layer"),
        ({"devices": 3}, {}, r"--devices=3: must divide the 8 experts of a layer"),
        ({"nodes": 3}, {}, r"--nodes=3: must divide --devices=4"),
        ({"nodes": 0}, {}, r"--nodes=0: must divide --devices=4"),
        ({"places": 10}, {}, r"--places=10: must be a multiple of --devices=4, at least the 8 exp"),
        ({"places": 4}, {}, r"--places=4: must be a multiple of --devices=4, at least the 8 exp"),
        ({"last": 2}, {}, r"--last=2: must be 1 to 1"),
        ({"loads": "no/such"}, {}, r"--loads=no/such: no such file or folder"),
        ({"held_out": "no/such"}, {}, r"--held_out=no/such: no such file or folder"),
        ({}, {"model.moe.router.name": "uniform"}, r"model\.moe\.router\.name='uniform': chooses"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changed, overrides, message):
    given = options(tmp_path, *EVEN, **changed)
    with pytest.raises(ValueError, match=f"^{message}"):
        placement.place(Subject(config_of(**overrides), None), given)


def test_devices_that_cut_groups_are_refused(tmp_path):
    experts = {"model.moe.n_routed_experts": 12, "model.moe.router.n_group": 2}
    given = options(tmp_path, [1] * 12, devices=3)
    message = (
        r"^--devices=3: must divide model\.moe\.router\.n_group=2, whose experts stay together, or"
    )
    with pytest.raises(ValueError, match=message):
        placement.place(Subject(config_of(**experts), None), given)


@pytest.fixture(autouse=True)
def arrays_stay(monkeypatch):
    """Only what is decided is tested here: there is no model."""
    monkeypatch.setattr(permutation, "permuted", lambda config, tree, orders: tree)


def test_one_half_decides_and_the_other_judges(tmp_path):
    """By hand: 8 + 1, 7 + 2, 6 + 3, 5 + 4; the others have one busy expert, in vain."""
    first, second = [8, 7, 6, 5, 4, 3, 2, 1], [8, 0, 0, 0, 0, 0, 0, 0]
    outcome = placement.place(
        Subject(config_of(), None), options(tmp_path, first, second, first, second)
    )
    (order,) = outcome.report["orders"]
    sums = np.array(first)[order].reshape(4, 2).sum(axis=1)
    assert sums.tolist() == [9, 9, 9, 9]
    assert outcome.report["batches"] == [2, 2]
    assert outcome.report["before"]["devices"] == {"decide": [15 / 9 - 1], "judge": [3]}
    assert outcome.report["after"]["devices"] == {"decide": [0], "judge": [3]}
    assert "before  devices  0.667  3.000" in outcome.text
    assert "after   devices  0.000  3.000" in outcome.text


def test_one_batch_has_no_judge(tmp_path):
    load_E = [8, 7, 6, 5, 4, 3, 2, 1]
    subject = Subject(config_of(), None)
    outcome = placement.place(subject, options(tmp_path, load_E, places=12))
    assert outcome.report["after"]["devices"]["judge"] is None
    assert outcome.text.startswith("MaxVio over devices, mean over layers, of 1 batches that")
    assert "there are no others to judge by" in outcome.text
    (plan,) = outcome.report["replicas"]["experts"]
    assert np.shape(plan) == (4, 3)
    other = tmp_path / "evaluation.json"
    json_files.write(other, {"load": [load_E]})
    outcome = placement.place(subject, options(tmp_path, load_E, held_out=str(other)))
    assert outcome.report["after"]["devices"]["judge"] == [0]


@pytest.mark.parametrize(("overrides", "whole"), [(GROUPS, 4), (DROP, 2)], ids=["groups", "drop"])
def test_parts_stay_whole(tmp_path, overrides, whole):
    load_E = [8, 7, 6, 5, 4, 3, 2, 1]
    config = config_of(**overrides)
    outcome = placement.place(Subject(config, None), options(tmp_path, load_E, devices=2))
    (order,) = outcome.report["orders"]
    parts = np.array(order).reshape(whole, -1) // (8 // whole)
    assert (parts == parts[:, :1]).all()
    nodes = placement.place(Subject(config, None), options(tmp_path, load_E, devices=8, nodes=2))
    assert [*nodes.report["after"]] == ["nodes", "devices"]
