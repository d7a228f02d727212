"""Merging: equal experts, whatever the order of their hidden units, give the same function."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.runs import json_files
from dsmoe_jax.surgery import OPERATIONS, Subject, fewer, merging
from tests.model.tiny_model import config_of
from tests.surgery import layer_in_numpy

E = 6


def options(**changed):
    own = {name: option.default for name, option in OPERATIONS["merge"].options.items()}
    return own | changed


class Model:
    """A model of one MoE layer alone."""

    def __init__(self, layer):
        self.params = {"layers": {"moe": layer}}


def subject(layer, **keys):
    e = layer["gate_EFD"].shape[1]
    keys = {"n_routed_experts": e, "num_experts_per_tok": 2, **keys}
    overrides = {f"model.moe.{key}": value for key, value in keys.items()}
    config = config_of(**{"model.num_hidden_layers": 3, **overrides})
    return Subject(config, Model(layer))


def drawn(e, f=4, d=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "router_ED": (e, d),
        "gate_EFD": (e, f, d),
        "up_EFD": (e, f, d),
        "down_EDF": (e, d, f),
    }
    return {name: rng.normal(size=(1, *shape)).astype(np.float32) for name, shape in shapes.items()}


def with_units_in(layer, expert, order_F):
    """An expert with its hidden units in another order: the same function."""
    layer["gate_EFD"][0, expert] = layer["gate_EFD"][0, expert][order_F]
    layer["up_EFD"][0, expert] = layer["up_EFD"][0, expert][order_F]
    layer["down_EDF"][0, expert] = layer["down_EDF"][0, expert][:, order_F]


@pytest.fixture(autouse=True)
def layers_alone(monkeypatch):
    """Only the layer is there: its arrays lie in a dictionary."""
    reduced = fewer.reduced

    def of_params(config, model, layers):
        return Model(reduced(config, model.params, layers)["layers"]["moe"])

    monkeypatch.setattr(fewer, "reduced", of_params)


def first(model):
    return {name: np.asarray(x[0], np.float64) for name, x in model.params["layers"]["moe"].items()}


@st.composite
def layers(draw):
    """Groups, experts of each, groups that a token activates, F, D."""
    groups = draw(st.integers(1, 4))
    each = draw(st.integers(2, 3))
    active = draw(st.integers(1, groups))
    return groups, each, active, draw(st.integers(2, 5)), draw(st.integers(2, 4))


@given(
    layers(), st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.integers(0, 10**6)
)  # fmt: skip
@settings(max_examples=6)
def test_equal_experts_become_one(sizes, scoring, norm, seed):
    """Copies with one router row and units in other orders, found and aligned; K / m of them."""
    groups, each, active, f, d = sizes
    norm = norm and active > 1  # one activated expert has no normalised gate
    rng = np.random.default_rng(seed)
    layer = drawn(groups, f, d, seed)
    source = rng.permutation(np.repeat(np.arange(groups), each))
    layer = {name: x[:, source].copy() for name, x in layer.items()}
    for expert in range(len(source)):
        with_units_in(layer, expert, rng.permutation(f))
    keys = {"router.scoring_func": scoring, "router.norm_topk_prob": norm}
    k = active * each
    before = subject(layer, num_experts_per_tok=k, **keys)
    outcome = merging.merge(before, options(by="aligned", keep=groups, per_token=active))
    assert sorted(len(ids) for ids in outcome.report["experts"][0]) == [each] * groups
    assert all(len({source[i] for i in ids}) == 1 for ids in outcome.report["experts"][0])
    x_TD = rng.normal(size=(5, d))
    scale = outcome.config.model.moe.router.routed_scaling_factor
    wanted = layer_in_numpy.moe(x_TD, first(before.model), k, scoring=scoring, norm=norm)
    found = layer_in_numpy.moe(
        x_TD, first(outcome.model), active, scoring=scoring, norm=norm, scale=scale
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_mean_by_use_after_alignment(tmp_path):
    """By hand: 1 is 0 in another order, plus a difference; it has a quarter of the use."""
    layer = drawn(4)
    for name in layer:
        layer[name][0, 1] = layer[name][0, 0]
    layer["gate_EFD"][0, 1] += 0.01
    with_units_in(layer, 1, [2, 0, 3, 1])
    before = {name: x.copy() for name, x in layer.items()}
    json_files.write(tmp_path / "evaluation.json", {"load": [[3, 1, 9, 0]]})
    given = options(together="0,1", loads=str(tmp_path / "evaluation.json"))
    outcome = merging.merge(subject(layer), given)
    assert outcome.report["experts"] == [[[0, 1], [2], [3]]]
    after = first(outcome.model)
    np.testing.assert_allclose(after["gate_EFD"][0], before["gate_EFD"][0, 0] + 0.0025, rtol=1e-5)
    np.testing.assert_allclose(after["down_EDF"][0], before["down_EDF"][0, 0], rtol=1e-5)
    np.testing.assert_array_equal(after["router_ED"][1:], before["router_ED"][0, 2:])
    assert outcome.moments is None
    assert outcome.load is not None
    assert outcome.load(np.array([[3, 1, 9, 0]])).tolist() == [[4, 9, 0]]


def test_a_threshold_joins_groups_of_which_all_are_alike():
    """By hand: 0 and 1 are alike, and 1 and 2, but not 0 and 2."""
    alike_EE = np.array([[1, 0.95, 0.5, 0], [0.95, 1, 0.9, 0], [0.5, 0.9, 1, 0], [0, 0, 0, 1]])
    ids = np.arange(4)
    joins, needed = merging.linked(alike_EE, ids, 0.85)
    assert needed == 3
    assert merging.cut(joins, ids, 3) == [[0, 1], [2], [3]]
    assert merging.cut(joins, ids, 2) == [[0, 1, 2], [3]]
    assert merging.linked(alike_EE, ids, 0.45)[1] == 2


def test_tables_follow_the_experts():
    """Equal experts of a fixed table: each token's expert is the one that its own became."""
    keys = {"router.name": "hash", "router.options": {"table": "frequency"}, "balance": {}}
    layer = drawn(4)
    del layer["router_ED"]
    layer["table_V"] = np.array([[0, 1, 2, 3, 4, 1]], np.int32)
    outcome = merging.merge(subject(layer, num_experts_per_tok=1, **keys), options(together="1,3"))
    assert np.asarray(outcome.model.params["layers"]["moe"]["table_V"]).tolist() == [
        [0, 1, 2, 1, 3, 1]
    ]


@pytest.mark.parametrize(
    ("changed", "keys", "message"),
    [
        (
            {"keep": 1},
            {},
            r"--keep=1: leaves 1 of the 6 experts of a layer; must be at least model",
        ),
        ({"threshold": -1.0}, {}, r"--threshold=-1\.0: leaves 1 of the 6 experts"),
        (
            {"together": "0,6"},
            {"n_identity_experts": 2},
            r"--together=0,6: 6 is an identity expert",
        ),
        ({"together": "0,9"}, {}, r"--together=0,9: 9 is no expert; must be ids from 0 to 5"),
        ({"together": "0,1;1,2"}, {}, r"--together=0,1;1,2: an expert is there twice"),
        ({"together": "a"}, {}, r"--together=a: must be ids of experts, as in 0,1;4,5,6"),
        ({"together": "0,1", "keep": 3}, {}, r"--keep=3: --together=0,1 says which; name one"),
        ({"by": "looks"}, {}, r"--by=looks: must be one of weights, aligned, outputs"),
        ({"per_token": 7}, {}, r"--per_token=7: must be 1 to the 6 experts"),
        ({"keep": 3, "per_token": 4}, {}, r"--keep=3: leaves 3 of the 6 experts of a layer"),
        (
            {"together": "2,3"},
            {"router.n_group": 2, "router.topk_group": 1},
            r"--together=2,3: experts of different groups of model\.moe\.router\.n_group=2",
        ),
        (
            {"together": "0,1"},
            {"router.n_group": 2, "router.topk_group": 1},
            r"--together=0,1: leaves \[2, 3\] experts in the groups",
        ),
        (
            {"per_token": 1},
            {"router.norm_topk_prob": True},
            r"--per_token=1: model\.moe\.router\.norm_topk_prob=True: with num_experts_per_tok=1",
        ),
        (
            {"per_token": 1},
            {"router.name": "token_table", "balance": {}},
            r"--per_token=1: the token_table router has a table of 2 experts",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changed, keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        merging.merge(subject(drawn(E), **keys), options(**changed))
