"""muP: every parameter has a kind, and begins with the deviation that its kind says."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import DictKey

import configs
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.model import mup
from dsmoe_jax.model.build import build_model, model_shapes
from dsmoe_jax.moe.routers import ROUTERS
from dsmoe_jax.nn.attention import ATTENTION
from dsmoe_jax.parallel.sharding import parameter_name
from tests.tools.routing import TASKS, tasks_of
from tests.tools.tiny import tiny
from tests.tools.trees import by_path

LEADING = {"model.first_k_dense_replace": 1, "model.intermediate_size": 64}
TWICE = {
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "model.attention.num_attention_heads": 4,
    "model.attention.num_key_value_heads": 4,
    "model.moe.moe_intermediate_size": 32,
}


OPTIONS = "model.attention.options."
LATENT = {
    "model.attention.name": "latent",
    "model.attention.num_key_value_heads": None,
    OPTIONS + "kv_lora_rank": 8,
    OPTIONS + "qk_rope_head_dim": 6,
}
# Models that have all the parameters there are, and what of each is twice as wide besides.
MODELS = [
    (
        {
            OPTIONS + "bias": True,
            OPTIONS + "qk_norm": "all",
            "model.moe.router.logits_bias": True,
            "model.moe.shared_expert_gate": True,
            "model.moe.expert.name": "gpt_oss",
            "model.mtp.num_nextn_predict_layers": 1,
        },
        {},
    ),
    (LATENT, {OPTIONS + "kv_lora_rank": 16}),
    (
        {**LATENT, OPTIONS + "q_lora_rank": 10},
        {OPTIONS + "kv_lora_rank": 16, OPTIONS + "q_lora_rank": 20},
    ),
    ({"model.moe.router.name": "task", "model.moe.router.tasks": TASKS}, {}),
]


def shapes(**overrides):
    """Path and shape of every parameter of a tiny model."""
    params = model_shapes(tiny(**{**LEADING, **overrides}).model).params
    return [(path, x.shape) for path, x in jax.tree.leaves_with_path(params)]


@pytest.mark.parametrize("name", configs.names())
def test_every_parameter_of_every_config_has_a_kind(name):
    config = from_config_dict(configs.load(name, "smoke"))
    base = {"model.mup_base_width": config.model.hidden_size}
    model_shapes(replace(config, **base).model)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_parameter_of_every_router_has_a_kind(name):
    k = ROUTERS[name].top or 2
    balance = {"model.moe.balance": {}}
    changes = {"model.moe.router.name": name, "model.moe.num_experts_per_tok": k, **balance}
    changes["model.moe.router.tasks"] = tasks_of(name)
    model_shapes(tiny(**changes, **{"model.mup_base_width": 32}).model)


@pytest.mark.parametrize("name", ATTENTION)
def test_every_parameter_of_every_attention_has_a_kind(name):
    model_shapes(tiny(**{"model.attention.name": name, "model.mup_base_width": 32}).model)


def test_kinds_are_those_that_the_shapes_of_two_widths_show():
    """A matrix is hidden where two of its sides grow; of one, the name says which side it is."""
    seen = set()
    for changes, twice in MODELS:
        wider = shapes(**{**TWICE, **changes, **twice})
        for (path, narrow), (_, wide) in zip(shapes(**changes), wider, strict=True):
            growing = sum(b == 2 * a for a, b in zip(narrow, wide, strict=True))
            fixed = [a for a, b in zip(narrow, wide, strict=True) if a == b]
            name = parameter_name(path)
            if growing == 2:
                expected = mup.HIDDEN
            elif name == "scale_D" or "_bias_" in name:
                expected = mup.VECTOR
            elif growing == 0:
                expected = mup.FIXED
            else:
                # Vocabulary, experts, rotated part; of the shared experts' gate the layers alone.
                assert growing == 1, path
                assert fixed[-1] in (512, 4, 6, 1), path
                expected = mup.INPUT if name == "embedding_VD" else mup.OUTPUT
            assert mup.kind(path) == expected, path
            seen.add(name)
    assert seen == set(mup.KINDS)


def test_initial_deviations_at_twice_the_base_width():
    """By hand: 1 for the embedding and norms, 2^-1/2 for hidden matrices, 1/2 for outputs."""
    by_hand = {"embedding_VD": 1.0, "scale_D": 1.0, "router_ED": 0.5, "head_VD": 0.5}
    config = tiny(**{**LEADING, **TWICE, "model.initializer_range": 0.05})
    with_mup = replace(config, **{"model.mup_base_width": 32})
    plain, scaled = (
        nnx.state(build_model(c.model, jax.random.key(0)), nnx.Param) for c in (config, with_mup)
    )
    for path, x in jax.tree.leaves_with_path(scaled):
        multiple = by_hand.get(parameter_name(path), 0.70710678)
        wanted = by_path(plain)[jax.tree_util.keystr(path)]
        np.testing.assert_allclose(x, multiple * wanted, rtol=1e-6, err_msg=str(path))
        if parameter_name(path) != "scale_D":
            # The deviation of n draws is known to 1 / sqrt(2 n).
            assert abs(np.std(x) / (0.05 * multiple) - 1) < 5 / np.sqrt(2 * x.size), path


def test_at_the_base_width_the_parameters_are_those_without_mup():
    plain, scaled = (
        nnx.state(build_model(tiny(**base).model, jax.random.key(0)), nnx.Param)
        for base in ({}, {"model.mup_base_width": 32})
    )
    jax.tree.map(np.testing.assert_array_equal, plain, scaled)


def test_a_parameter_without_a_kind_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"mup_base_width: layers/moe/side_DD has no kind"):
        mup.kind((DictKey("layers"), DictKey("moe"), DictKey("side_DD")))
    monkeypatch.delitem(mup.KINDS, "router_ED")
    with pytest.raises(ValueError, match=r"layers/moe/router_ED has no kind; KINDS in .*mup\.py"):
        model_shapes(
            tiny(**{"model.mup_base_width": 23}).model
        )  # of no other test: shapes are kept
    model_shapes(tiny().model)  # without muP it needs none


@pytest.mark.parametrize("value", [0, -48])
def test_a_width_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match=rf"model\.mup_base_width={value}: must be > 0"):
        tiny(**{"model.mup_base_width": value})


def test_it_cannot_change_during_a_run():
    stages = {"train.stages.share": (0.5, 0.5), "train.stages.model.mup_base_width": (None, 16)}
    with pytest.raises(ValueError, match=r"mup_base_width cannot change during a run"):
        tiny(**stages)
