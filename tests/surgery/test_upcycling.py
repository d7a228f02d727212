"""Upcycling: the same function at step 0 where mathematics allows, and what is refused."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.surgery import OPERATIONS, Subject
from dsmoe_jax.surgery.upcycling import upcycle
from dsmoe_jax.training.start import abstract_state, state_shapes
from tests.model.tiny_model import V, config_of
from tests.surgery import layer_in_numpy
from tests.tools.trees import by_path

DENSE = {
    "model.num_hidden_layers": 3,
    "model.first_k_dense_replace": 0,
    "model.hidden_size": 16,
    "model.attention.num_attention_heads": 2,
    "model.moe.n_routed_experts": 0,
    "model.moe.num_experts_per_tok": 0,
    "model.moe.moe_intermediate_size": 24,
    "model.moe.balance": {},
}


def options(**changed):
    own = {name: option.default for name, option in OPERATIONS["upcycle"].options.items()}
    return own | {"copies": 3} | changed


def subject(**overrides):
    """A dense model of random weights."""
    config = config_of(**{**DENSE, **overrides})
    rng = np.random.default_rng(0)
    shapes = model_shapes(config.model)
    return Subject(
        config, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    )


def logits(subject):
    tokens_BS = jax.random.randint(jax.random.key(5), (2, 12), 0, V)
    graph = abstract_model(subject.config.model)

    @jax.jit
    def run(state):
        return nnx.merge(graph, *state).forward(ModelInputs(tokens_BS)).logits_BSV

    return np.asarray(run(subject.model))


def test_a_model_gives_the_same_logits():
    """Shared and routed parts, biases, dense layers before and between, multi-token prediction."""
    before = subject(
        **{
            "model.moe.expert.name": "gpt_oss",
            "model.mtp.num_nextn_predict_layers": 1,
            "model.first_k_dense_replace": 1,
            "model.intermediate_size": 24,
        }
    )
    given = options(
        parts=4, shared=1, shuffle=True, fold=True, moe_layer_freq=2, copies_per_token=2
    )
    outcome = upcycle(before, given)
    assert outcome.report["exact"]
    assert "the function is the same at step 0" in outcome.text
    wanted = logits(before)
    np.testing.assert_allclose(logits(outcome), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    shapes = model_shapes(outcome.config.model)
    assert jax.tree.map(np.shape, outcome.model) == jax.tree.map(np.shape, shapes)


@st.composite
def cuts(draw):
    """Copies, active ones, parts, shared ones, width of a part, hidden size."""
    parts = draw(st.integers(1, 4))
    shared = draw(st.integers(0, parts - 1))
    least = 2 if parts - shared == 1 else 1  # one activated expert has no normalised gate
    copies = draw(st.integers(least, 4))
    active = draw(st.integers(least, copies))
    return copies, active, parts, shared, draw(st.integers(1, 4)), draw(st.integers(1, 3)) * 2


def layers_of(model):
    """The first MoE layer in float64."""
    layer = nnx.to_pure_dict(model.params)["layers"]["moe"]
    return jax.tree.map(lambda x: np.asarray(x[0], np.float64), layer)


def computed(outcome, x_TD):
    """The new layer's output, in numpy."""
    moe = outcome.config.model.moe
    return layer_in_numpy.moe(
        x_TD,
        layers_of(outcome.model),
        moe.num_experts_per_tok,
        scoring=moe.router.scoring_func,
        norm=moe.router.norm_topk_prob,
        scale=moe.router.routed_scaling_factor,
    )


def computed_before(subject, x_TD):
    shared = layers_of(subject.model)["shared"]
    return layer_in_numpy.ffn(x_TD, shared["gate_FD"], shared["up_FD"], shared["down_DF"])


@given(cuts(), st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=6)
def test_any_cut_computes_the_same(cut, scoring, shuffle, seed):
    """In numpy, which knows nothing of ours."""
    copies, active, parts, shared, f, d = cut
    sizes = {"hidden_size": d, "moe.moe_intermediate_size": f * parts, "num_hidden_layers": 1}
    before = subject(**{f"model.{key}": value for key, value in sizes.items()})
    given = options(
        copies=copies, copies_per_token=active, parts=parts, shared=shared, shuffle=shuffle,
        scoring_func=scoring, seed=seed, router_std=1.0, fold=not shuffle,
    )  # fmt: skip
    outcome = upcycle(before, given)
    assert outcome.report["exact"]
    x_TD = np.random.default_rng(seed).normal(size=(5, d))
    wanted = computed_before(before, x_TD)
    np.testing.assert_allclose(computed(outcome, x_TD), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "scale"),
    [
        ({"norm_topk_prob": False}, 3),
        ({"norm_topk_prob": False, "scoring_func": "sigmoid"}, 2),
        ({"norm_topk_prob": False, "parts": 3, "shared": 1, "copies_per_token": 2}, 3),
    ],
)
def test_without_normalised_gates_it_is_right_for_flat_scores(changed, scale):
    """The scale is that of logits near 0; larger ones change the sum of gates."""
    before = subject(**{"model.num_hidden_layers": 1})
    x_TD = np.random.default_rng(1).normal(size=(5, 16))
    wanted = computed_before(before, x_TD)
    outcome = upcycle(before, options(router_std=1e-7, fold=False, **changed))
    assert not outcome.report["exact"]
    assert "about the same" in outcome.text
    factor = outcome.config.model.moe.router.routed_scaling_factor
    assert factor == pytest.approx(scale, rel=1e-6)
    np.testing.assert_allclose(computed(outcome, x_TD), wanted, rtol=1e-3, atol=1e-3)
    outcome = upcycle(before, options(router_std=1.0, **changed))
    assert np.abs(computed(outcome, x_TD) / wanted - 1).max() > 0.05


def test_rows_of_their_own_are_not_exact():
    before = subject(**{"model.num_hidden_layers": 1})
    outcome = upcycle(before, options(parts=2, tied=False))
    assert not outcome.report["exact"]
    rows = np.asarray(outcome.model.params["layers"]["moe"]["router_ED"][...])[0]
    assert len(np.unique(rows, axis=0)) == 6


def test_drop_and_noise():
    """Half of the units are new, at other places in each expert; or all weights have noise."""
    before = subject(**{"model.num_hidden_layers": 1})
    dense = layers_of(before.model)["shared"]
    dropped = upcycle(before, options(copies_per_token=2, drop=0.5))
    assert not dropped.report["exact"]
    layer = layers_of(dropped.model)
    same_EF = (layer["gate_EFD"] == dense["gate_FD"]).all(axis=2)
    assert same_EF.sum(axis=1).tolist() == [12, 12, 12]
    assert len({tuple(row) for row in same_EF}) == 3
    assert ((layer["down_EDF"] == dense["down_DF"]).all(axis=1) == same_EF).all()
    noisy = upcycle(before, options(copies_per_token=2, noise=0.1))
    change = layers_of(noisy.model)["gate_EFD"] - dense["gate_FD"]
    assert change.std() / dense["gate_FD"].std() == pytest.approx(0.1, rel=0.1)


def test_moments_are_those_of_the_units():
    overrides = {"model.first_k_dense_replace": 1, "model.intermediate_size": 24}
    before = subject(**overrides)
    rng = np.random.default_rng(3)
    state = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_state(before.config).opt_state
    )
    outcome = upcycle(before, options(parts=2, first_k_dense_replace=2, noise=0.5))
    assert outcome.moments is not None
    found, shapes = outcome.moments(state), state_shapes(outcome.config).opt_state
    assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, shapes)
    old = by_path(state)
    new = by_path(found)
    at = "[1][0].mu"
    gate_EFD = new[f"{at}['layers']['moe']['gate_EFD'].value"][0]
    wanted = old[f"{at}['layers']['moe']['shared']['gate_FD'].value"][1]
    np.testing.assert_array_equal(gate_EFD.reshape(3, 24, 16), np.stack([wanted] * 3))
    assert (np.asarray(new[f"{at}['layers']['moe']['router_ED'].value"]) == 0).all()
    np.testing.assert_array_equal(
        new[f"{at}['leading'][1]['ffn']['down_DF'].value"],
        old[f"{at}['layers']['moe']['shared']['down_DF'].value"][0],
    )
    assert new["[1][0].count"] == old["[1][0].count"]


@pytest.mark.parametrize(
    ("changed", "overrides", "message"),
    [
        ({"parts": 5}, {}, r"--parts=5: must divide the width 24 of the dense FFN"),
        ({"copies": 0}, {}, r"--copies=0: must be at least 1"),
        ({"parts": 2, "shared": 2}, {}, r"--shared=2: must be 0 to 1, below --parts=2"),
        ({"copies_per_token": 4}, {}, r"--copies_per_token=4: must be 1 to the --copies=3"),
        ({}, {}, r"--norm_topk_prob=True: with one activated expert every gate would be 1"),
        ({"parts": 2, "drop": 2.0}, {}, r"--drop=2\.0: must be a share, from 0 to 1"),
        ({"parts": 2, "noise": -1.0}, {}, r"--noise=-1\.0: must be 0 or more"),
        ({"parts": 2, "scoring_func": "soft"}, {}, r"--scoring_func=soft: must be one of softmax"),
        (
            {"parts": 2, "first_k_dense_replace": 3},
            {},
            r"model\.first_k_dense_replace=3: must be below num_hidden_layers=3",
        ),
        (
            {"parts": 2, "first_k_dense_replace": 2},
            {"model.first_k_dense_replace": 1, "model.intermediate_size": 48},
            r"model\.intermediate_size=48: other layers are 24 wide",
        ),
        (
            {"parts": 2},
            {"model.moe.shared_expert_gate": True},
            r"model\.moe\.shared_expert_gate=True: experts have no such gate; must be False",
        ),
        (
            {},
            {"model.moe.n_routed_experts": 4, "model.moe.num_experts_per_tok": 2},
            r"model\.moe\.n_routed_experts=4: is a mixture already; must be a dense model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changed, overrides, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        upcycle(Subject(config_of(**{**DENSE, **overrides}), None), options(**changed))
