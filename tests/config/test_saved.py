"""The config.json of a run that is older than some keys, or damaged."""

import copy
import json

import pytest

from dsmoe_jax.config import from_config_dict, from_saved, to_config_dict
from tests.tools.tiny import tiny

STAGED = {"train.stages.share": (0.5, 0.5), "train.stages.model.moe.num_experts_per_tok": (1, 2)}


def saved(**overrides):
    """The tree of a tiny config as JSON gives it back."""
    return json.loads(json.dumps(to_config_dict(tiny(**overrides)).to_dict()))


def without(tree, *keys):
    tree = copy.deepcopy(tree)
    for key in keys:
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node[part]
        del node[leaf]
    return tree


def test_a_whole_one_is_given_nothing():
    tree = saved(**STAGED, **{"model.moe.drop.capacity_factor": 1.5})
    assert from_saved(tree) == (from_config_dict(tree), {})


def test_missing_keys_have_their_defaults_and_are_named():
    """In sections, in sections that may be None, in those by name, and whole sections."""
    drop = {"model.moe.drop.capacity_factor": 1.5}
    tree = saved(**drop)
    keys = {
        "scale": "paper",
        "model.moe.expert_groups": 1,
        "model.moe.drop.policy": "position",
        "model.moe.balance.router_z.schedule": None,
        "mesh": {
            "stage": 1,
            "data": -1,
            "fsdp": 1,
            "expert": 1,
            "tensor": 1,
            "slices": -1,
            "fallbacks": (),
        },
    }
    config, added = from_saved(without(tree, *keys))
    assert added == keys
    assert config == tiny(**drop)
    with pytest.raises(ValueError, match=r"missing"):
        from_config_dict(without(tree, *keys))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (without(saved(), "model.moe.balance.router_z.factor"), r"router_z\.factor=None: missing"),
        (without(saved(), "model"), r"^model=None: missing"),
        ({}, r"^model=None: missing"),
        ({**saved(), "modle": 1}, r"^modle=1: no such key; did you mean model\?"),
        ({**saved(), "train": 3}, r"^train=3: must be a section"),
        ({**saved(), "train": {"step": 3}}, r"^train\.step=3: .*did you mean train\.steps\?"),
        ({**saved(), "optimizer": {"peak_learning_rate": float("inf")}}, r"=inf: must be finite"),
        ({**saved(), "optimizer": {"peak_learning_rate": 10**400}}, r"=inf: must be finite"),
        ({**saved(), "train": "n" * 10_000}, r"^train='n+\.\.\.n+': must be a section$"),
    ],
)
def test_what_cannot_be_right_is_refused(tree, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_saved(tree)
    assert len(str(caught.value)) < 400


def test_a_key_that_is_no_more_is_left_out_if_no_number_depended_on_it():
    tree = saved()
    tree["model"]["moe"]["dispatch"]["buffer_factor"] = 2.0
    before = copy.deepcopy(tree)
    assert from_saved(tree) == (tiny(), {})
    assert tree == before
    with pytest.raises(ValueError, match=r"buffer_factor=2\.0: no such key"):
        from_config_dict(tree)
