"""Pruning and extraction: which experts stay, that the others change nothing, and refusals."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import replace
from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.runs import json_files
from dsmoe_jax.surgery import OPERATIONS, Subject, fewer, likeness, pruning
from dsmoe_jax.surgery.evidence import Evidence
from tests.model.tiny_model import V, config_of
from tests.surgery import layer_in_numpy
from tests.tools.trees import by_path

E = 6


def options(operation="prune", **changed):
    own = {name: option.default for name, option in OPERATIONS[operation].options.items()}
    return own | changed


def subject(config, seed=0):
    rng = np.random.default_rng(seed)

    def draw(x):
        if np.issubdtype(x.dtype, np.integer):
            return rng.integers(0, config.model.moe.n_routed_experts, x.shape).astype(x.dtype)
        return rng.normal(0, 0.3, x.shape).astype(np.float32)

    return Subject(config, jax.tree.map(draw, model_shapes(config.model)))


def arrays(model):
    """Routed experts and router of the first stack, to be written to."""
    return {
        path[-1].removesuffix("'].value").rpartition("'")[2]: x
        for path, x in ((name.split("['moe']"), x) for name, x in by_path(model).items())
        if "['layers']['moe']" in "['moe']".join(path) and "shared" not in path[-1]
    }


def file_of(tmp_path, load_LE):
    json_files.write(tmp_path / "evaluation.json", {"load": load_LE})
    return str(tmp_path / "evaluation.json")


def test_of_two_alike_one_goes():
    """By hand: 0 and 2 are alike, then 1 and 3; below the threshold nothing needs to go."""
    alike_EE = np.array([[1, 0.1, 0.95, 0], [0.1, 1, 0, 0.9], [0.95, 0, 1, 0.2], [0, 0.9, 0.2, 1]])
    ids = np.arange(4)
    found = pruning.ranked(alike_EE, None, ids, 0.85)
    assert (found.ids.tolist(), found.needed) == ([0, 1, 3, 2], 2)
    assert pruning.ranked(alike_EE, None, ids, 0.92).needed == 3
    used = pruning.ranked(alike_EE, np.array([1, 5, 2, 4]), ids, 0.85)
    assert (used.ids.tolist(), used.needed) == ([1, 2, 3, 0], 2)


def copied(config, pairs):
    """A model in which some experts of the layers are others' copies: {layer: {to: from}}."""
    found = subject(config)
    for name, x in arrays(found.model).items():
        for layer, copies in pairs.items():
            for to, source in copies.items():
                if name != "router_ED":
                    x[layer, to] = x[layer, source]
    return found


def test_all_layers_keep_as_many_as_the_one_that_needs_most():
    config = config_of()
    pairs = {0: {1: 0, 5: 4}, 1: {3: 2}}
    before = copied(config, pairs)
    outcome = pruning.prune(before, options())
    assert outcome.report["needed"] == [4, 5]
    assert outcome.config.model.moe.n_routed_experts == 5
    first, second = outcome.report["experts"]
    assert second == [0, 1, 2, 4, 5]
    assert len(first) == 5
    assert {1, 5} & {*range(E)} - {*first}  # one of the two that the first layer has twice
    assert "the layers need 4, 5; all keep 5" in outcome.text
    after = arrays(outcome.model)
    for name, x in arrays(before.model).items():
        wanted = np.stack([x[0][first], x[1][second]])
        np.testing.assert_array_equal(after[name], wanted, err_msg=name)
    fewest = pruning.prune(before, options(keep=3))
    assert np.shape(fewest.report["experts"]) == (2, 3)
    assert set(fewest.report["experts"][0]) <= {0, 2, 3, 4}


def test_never_used_experts_change_no_logits(tmp_path):
    """With identity experts, biases of all kinds and several stacks."""
    config = config_of(
        **{
            "model.num_hidden_layers": 4,
            "model.first_k_dense_replace": 1,
            "model.moe_layer_freq": 2,
            "model.moe_layer_offset": 1,
            "model.moe.expert.name": "gpt_oss",
            "model.moe.n_identity_experts": 2,
            "model.moe.router.logits_bias": True,
            "model.moe.router.scoring_func": "sigmoid",
            "model.moe.router.bias_update_speed": 0.01,
        }
    )
    before = subject(config)
    used = [[0, 2, 3, 5], [1, 2, 3, 4]]
    other = by_path(before.model.other)
    for stack, ids in zip(("['layers']", "['further'][0]['layers']"), used, strict=True):
        (bias_LE,) = (x for name, x in other.items() if name.startswith(f"{stack}['moe']['bias_E"))
        bias_LE[0, [i for i in range(E) if i not in ids]] = -10.0  # they are never chosen
    load = [[7 if i in ids else 0 for i in range(E)] for ids in used]
    outcome = pruning.prune(before, options(by="use", loads=file_of(tmp_path, load)))
    assert outcome.report["experts"] == used
    tokens_BS = jax.random.randint(jax.random.key(5), (2, 12), 0, V)

    def logits(subject):
        graph = abstract_model(subject.config.model)
        run = jax.jit(lambda state: nnx.merge(graph, *state).forward(ModelInputs(tokens_BS)))
        return np.asarray(run(subject.model).logits_BSV)

    wanted = logits(before)
    np.testing.assert_allclose(logits(outcome), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert outcome.load is not None
    assert outcome.load(np.array(load)).tolist() == [[7] * 4] * 2
    shapes = model_shapes(outcome.config.model)
    assert jax.tree.map(np.shape, outcome.model) == jax.tree.map(np.shape, shapes)


@given(
    st.integers(2, 8), st.integers(1, 4), st.booleans(), st.sampled_from(["softmax", "sigmoid"]),
    st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=20)
def test_gates_grow_by_the_share_of_what_went(e, k, norm, scoring, seed):
    """Exact but for a softmax over all experts, whose gates grow by a known share."""
    rng = np.random.default_rng(seed)
    k = min(k, e - 1)
    gone = rng.permutation(e)[: rng.integers(1, e - k + 1)]
    left = np.setdiff1d(np.arange(e), gone)
    shapes = {
        "router_ED": (e, 3),
        "gate_EFD": (e, 4, 3),
        "up_EFD": (e, 4, 3),
        "down_EDF": (e, 3, 4),
    }
    layer = {name: rng.normal(size=(1, *shape)) for name, shape in shapes.items()}
    keys = {"n_routed_experts": e, "num_experts_per_tok": k, "router.name": "topk"}
    model = config_of(
        **{f"model.moe.{key}": x for key, x in keys.items()},
        **{"model.num_hidden_layers": 3},
    ).model
    tree = {"layers": {"moe": layer}}
    after = fewer.reduced(model, tree, [fewer.kept(left, np.eye(e))])["layers"]["moe"]
    before, after = ({name: x[0] for name, x in found.items()} for found in (layer, after))
    x_TD = rng.normal(size=(5, 3))
    bias_E = np.isin(np.arange(e), gone) * -1e3
    wanted = layer_in_numpy.moe(x_TD, before, k, scoring=scoring, norm=norm, bias_E=bias_E)
    if scoring == "softmax" and not norm:
        odds_TE = np.exp(x_TD @ before["router_ED"].T)
        wanted *= odds_TE.sum(axis=1, keepdims=True) / odds_TE[:, left].sum(axis=1, keepdims=True)
    found = layer_in_numpy.moe(x_TD, after, k, scoring=scoring, norm=norm)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("noisy_topk", [0, 2, 3, 6, 7, 9, 10, 13]),  # logits of all, then noise of all
        ("dynamic_specialised", [0, 1, 2, 3, *range(8, 16), *range(24, 28)]),  # four side by side
    ],
)
def test_all_router_rows_of_an_expert_go(name, wanted):
    """By hand: 1, 4 and 5 of six go, and an identity expert stays behind the others."""
    keys = {"router.name": name, "n_identity_experts": 1, "balance": {}}
    model = config_of(
        **{f"model.moe.{key}": x for key, x in keys.items()}, **{"model.num_hidden_layers": 3}
    ).model
    n = len(wanted) // 4 * 7
    tree = {"layers": {"moe": {"router_ED": np.arange(n, dtype=np.float32).reshape(1, n, 1)}}}
    layer = fewer.kept(np.array([0, 2, 3]), np.eye(E))
    found = fewer.reduced(model, tree, [layer])["layers"]["moe"]["router_ED"]
    assert found.ravel().tolist() == wanted
    mean = fewer.Layer(np.array([[0.5, 0, 0, 0, 0, 0.5], [0, 1, 0, 0, 0, 0]]), layer.place_EN)
    found = np.ravel(fewer.reduced(model, tree, [mean])["layers"]["moe"]["router_ED"])
    rows = [0, 5] if name == "noisy_topk" else [0, 20]
    assert found[0] == np.mean(rows)


@pytest.mark.parametrize("name", ["hash", "token_table"])
def test_tables_give_tokens_to_the_expert_most_alike(name):
    """By hand: 1 goes and is like 4; a token that has 4 already gets the next one."""
    k = {"hash": 1, "token_table": 2}[name]
    keys = {"router.name": name, "num_experts_per_tok": k, "balance": {}}
    keys |= {"router.options": {"table": "frequency"}} if name == "hash" else {}
    model = config_of(
        **{f"model.moe.{key}": x for key, x in keys.items()}, **{"model.num_hidden_layers": 3}
    ).model
    alike_EE = np.eye(E)
    alike_EE[1] = [0.3, 1, 0.1, 0.2, 0.9, 0.4]
    layer = fewer.kept(np.array([0, 2, 3, 4, 5]), alike_EE)
    key, ids, wanted = {
        "hash": ("table_V", [0, 1, 5, 6], [0, 3, 4, 5]),
        "token_table": ("table_VK", [[1, 0], [1, 4], [3, 6]], [[3, 0], [4, 3], [2, 5]]),
    }[name]
    tree = {"layers": {"moe": {key: np.array([ids], np.int32)}}}
    found = fewer.reduced(model, tree, [layer])["layers"]["moe"][key]
    assert found.tolist() == [wanted]


def test_extraction_keeps_a_share_of_the_load(tmp_path):
    """By hand: 0.8 of the first layer's load is with two experts, of the second's with three."""
    before = subject(config_of())
    load = [[50, 40, 4, 3, 2, 1], [2, 30, 1, 30, 35, 2]]
    given = options("extract", loads=file_of(tmp_path, load), share=0.8)
    outcome = pruning.extract(before, given)
    report = {"experts": [[0, 1, 2], [1, 3, 4]], "needed": [2, 3], "share": [0.94, 0.95]}
    assert {key: outcome.report[key] for key in report} == report
    assert outcome.text.endswith("their share of the use, by layer: 0.940, 0.950")
    fixed = pruning.extract(before, options("extract", loads=given["loads"], keep=2))
    assert fixed.report["experts"] == [[0, 1], [1, 4]]  # of equal loads the first


def test_extraction_by_gates(tmp_path):
    """By hand: the gates of few assignments may be most of them."""
    json_files.write(
        tmp_path / "both.json",
        {"load": [[9, 9, 1, 1, 1, 1]] * 2, "gate_mass": [[0.5, 0.5, 4.0, 4.0, 0.5, 0.5]] * 2},
    )
    given = options("extract", loads=str(tmp_path / "both.json"), by="gates", share=0.8)
    outcome = pruning.extract(subject(config_of()), given)
    assert outcome.report["experts"] == [[2, 3]] * 2
    assert outcome.report["share"] == [0.8, 0.8]


def test_groups_stay_equal(tmp_path):
    groups = {"model.moe.router.n_group": 2, "model.moe.router.topk_group": 1}
    before = subject(config_of(**groups))
    load = [[9, 0, 0, 9, 8, 0], [0, 1, 0, 0, 5, 0]]
    outcome = pruning.prune(before, options(by="use", loads=file_of(tmp_path, load)))
    assert outcome.report["experts"] == [[0, 1, 3, 4], [0, 1, 3, 4]]
    assert outcome.report["needed"] == [3, 2]
    with pytest.raises(ValueError, match=r"^--keep=5: leaves 5 .* multiple of .*n_group=2$"):
        pruning.prune(before, options(keep=5))
    with pytest.raises(ValueError, match=r"^--keep=2: leaves 2 experts of a layer, of which a tok"):
        pruning.prune(before, options(keep=2))


def test_trained_experts_are_renamed(tmp_path):
    config = replace(
        config_of(),
        **{"train.trainable.part": "chosen_experts", "train.trainable.experts": ((0, 3), (5,))},
    )
    load = file_of(tmp_path, [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    outcome = pruning.prune(subject(config), options(by="use", loads=load))
    assert outcome.config.train.trainable.experts == ((2,), ())


def test_likeness_in_the_best_order_of_hidden_units():
    rng = np.random.default_rng(0)
    shapes = {
        "gate_EFD": (3, 5, 4),
        "up_EFD": (3, 5, 4),
        "down_EDF": (3, 4, 5),
        "down_bias_ED": (3, 4),
    }
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    order = rng.permutation(5)
    for name, x in weights.items():
        axis = likeness.UNIT_AXES[name]
        x[2] = x[0] if axis is None else x[0].take(order, axis - 1)
    alike_EE = likeness.aligned(weights)
    assert alike_EE[0, 2] == pytest.approx(1)
    assert abs(alike_EE[0, 1]) < 0.9
    np.testing.assert_allclose(alike_EE, alike_EE.T)


LOADS = [[1] * E] * 2


@pytest.mark.parametrize(
    ("operation", "changed", "message"),
    [
        ("prune", {"threshold": -1.0}, r"--threshold=-1\.0: leaves 1 of the 6 experts of a layer;"
         r" must be at least model\.moe\.num_experts_per_tok=2 and at most all"),
        ("prune", {"keep": 1}, r"--keep=1: leaves 1 of the 6 experts of a layer"),
        ("prune", {"keep": 7}, r"--keep=7: leaves 7 of the 6 experts of a layer"),
        ("prune", {"threshold": 1.5}, r"--threshold=1\.5: must be a cosine, from -1 to 1"),
        ("prune", {"threshold": 0.5, "keep": 3}, r"--threshold=0\.5: --keep=3 says how many"),
        ("prune", {"by": "looks"}, r"--by=looks: must be one of weights, aligned, outputs, use, "),
        ("prune", {"by": "use"}, r"--loads: missing; --by=use counts the tokens of each expert"),
        ("prune", {"by": "use", "threshold": 0.5}, r"--threshold=0\.5: has no meaning for --by"),
        ("prune", {"text": "x"}, r"--text='x': --by=weights takes no text; must not be given"),
        ("prune", {"by": "outputs"}, r"data\.corpus=None: the text of the run is not there"),
        ("prune", {"by": "loss", "keep": 1}, r"--keep=1: leaves 1 of the 6 experts"),
        ("prune", {"loads": "OTHER"}, r"--loads=.*: has loads of 2 x 5 .* the model 2 x 6"),
        ("extract", {"loads": "LOADS", "share": 1.5}, r"--share=1\.5: must be above 0"),
        ("extract", {"loads": "LOADS", "share": 0.1}, r"--share=0\.1: leaves 1 of the 6 experts"),
        ("extract", {"loads": "LOADS", "by": "gates"}, r"--loads=.*: holds no gate mass of expert"),
        ("extract", {"loads": "LOADS", "by": "looks"}, r"--by=looks: must be one of assignments, "),
        ("extract", {"loads": "NONE"}, r"--loads=.*: layer 1 has no load"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, operation, changed, message):
    files = {"OTHER": [[1] * 5] * 2, "LOADS": LOADS, "NONE": [[1] * E, [0] * E]}
    if changed.get("loads") in files:
        changed = changed | {"loads": file_of(tmp_path, files[changed["loads"]])}
    run = OPERATIONS[operation].run
    with pytest.raises(ValueError, match=f"^{message}"):
        run(subject(replace(config_of(), **{"data.corpus": None})), options(operation, **changed))


def test_a_table_has_no_next_best_expert():
    keys = {"router.name": "hash", "num_experts_per_tok": 1, "balance": {}}
    before = subject(config_of(**{f"model.moe.{key}": value for key, value in keys.items()}))
    message = r"^model\.moe\.router\.name='hash': a token has no next best expert; no expert can"
    with pytest.raises(ValueError, match=message):
        pruning.WAYS["loss"].rank(before, Evidence(text=[]), 0.0)


def test_routers_by_number_and_dense_models_are_refused():
    keys = {"model.moe.router.name": "uniform", "model.moe.balance": {}}
    with pytest.raises(
        ValueError, match=r"^model\.moe\.router\.name='uniform': chooses experts by"
    ):
        pruning.prune(Subject(config_of(**keys), None), options())
