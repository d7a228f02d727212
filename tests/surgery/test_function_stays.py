"""Whole models of drawn sizes: equal experts merged, and experts pruned that no token chooses."""

import jax
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.surgery import Subject, likeness, merging, pruning
from dsmoe_jax.surgery.evidence import Evidence
from tests.model.tiny_model import V, config_of

TOKENS_BS = jax.random.randint(jax.random.key(5), (2, 8), 0, V)
SIZES = st.fixed_dictionaries(
    {
        "groups": st.integers(2, 3),  # of equal experts
        "each": st.integers(2, 3),
        "f": st.sampled_from([3, 8]),
        "shared": st.integers(0, 1),
        "layers": st.integers(1, 2),
    }
)


def drawn(sizes, k, scoring, seed):
    """A model of those sizes, its parameters as a tree that may be written to."""
    config = config_of(
        **{
            "model.num_hidden_layers": sizes["layers"],
            "model.first_k_dense_replace": 0,
            "model.moe.n_routed_experts": sizes["groups"] * sizes["each"],
            "model.moe.num_experts_per_tok": k,
            "model.moe.n_shared_experts": sizes["shared"],
            "model.moe.moe_intermediate_size": sizes["f"],
            "model.moe.router.scoring_func": scoring,
            "model.moe.router.bias_update_speed": 0.01 if scoring == "sigmoid" else None,
        }
    )
    rng = np.random.default_rng(seed)

    def draw(x):
        return rng.normal(0, 0.3, x.shape).astype(np.float32)

    return Subject(config, jax.tree.map(draw, model_shapes(config.model))), rng


def arrays(subject):
    """Those of the MoE layers by name, (L, E, ...)."""
    moe = subject.model.params["layers"]["moe"]
    return {name: moe[name][...] for name in (*likeness.UNIT_AXES, "router_ED") if name in moe}


def logits(subject):
    graph = abstract_model(subject.config.model)
    run = jax.jit(lambda state: nnx.merge(graph, *state).forward(ModelInputs(TOKENS_BS)))
    return np.asarray(run(subject.model).logits_BSV)


def assert_same(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@given(SIZES, st.integers(1, 2), st.integers(0, 10**6))
@settings(max_examples=2)
def test_equal_experts_merged(sizes, active, seed):
    """Copies with one router row and units in other orders; a token then has the one, not all."""
    each = sizes["each"]
    before, rng = drawn(sizes, active * each, "softmax", seed)
    source = np.repeat(np.arange(sizes["groups"]), each)
    for x in arrays(before).values():
        for layer in x:
            layer[:] = layer[source * each]
    orders = rng.permuted(np.tile(np.arange(sizes["f"]), (len(source), 1)), axis=1)
    for name, x in arrays(before).items():
        axis = likeness.UNIT_AXES.get(name)
        if axis is not None:
            for layer in x:
                for i, order_F in enumerate(orders):
                    layer[i] = layer[i].take(order_F, axis - 1)
    outcome = merging.merged_by(
        before, "aligned", Evidence(), keep=sizes["groups"], per_token=active
    )
    assert outcome.report["experts"][0] == [
        np.flatnonzero(source == g).tolist() for g in range(sizes["groups"])
    ]
    assert_same(logits(outcome), logits(before))


@given(SIZES, st.integers(0, 10**6))
@settings(max_examples=2)
def test_experts_pruned_that_no_token_chooses(sizes, seed):
    """Sigmoid scores, whose gates depend on the chosen experts alone."""
    before, rng = drawn(sizes, 2, "sigmoid", seed)
    n = sizes["groups"] * sizes["each"]
    left = rng.integers(2, n)
    use_LE = np.ones((sizes["layers"], n))
    (bias_LE,) = jax.tree.leaves(before.model.other)
    for use_E, bias_E in zip(use_LE, bias_LE, strict=True):
        gone = rng.permutation(n)[left:]
        use_E[gone] = 0
        bias_E[gone] = -1e3
    ranked = pruning.WAYS["use"].rank(before, Evidence(use_LE=use_LE), 0.0)
    outcome = pruning.cut(before, ranked, None, "")
    assert outcome.config.model.moe.n_routed_experts == left
    assert_same(logits(outcome), logits(before))
