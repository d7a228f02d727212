"""The dataclasses refuse what cannot be, in one line that names the key and the value."""

import dataclasses
import json
import math
import re
import types
import typing

import jax
import numpy as np
import pytest

import dsmoe_jax.config
from dsmoe_jax.config import (
    BalanceTerm,
    Config,
    DropConfig,
    MoEConfig,
    RouterConfig,
    differences,
    from_config_dict,
    replace,
    to_config_dict,
)
from dsmoe_jax.config.frozen import FrozenDict


def hints(cls=Config, prefix=""):
    """(dotted key, type) of every value of a config; `X | None` is X, as are sections."""
    for name, hint in typing.get_type_hints(cls).items():
        plain = next((h for h in typing.get_args(hint) if dataclasses.is_dataclass(h)), hint)
        if plain is hint and isinstance(hint, types.UnionType):
            plain = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(plain):
            yield from hints(plain, f"{prefix}{name}.")
        else:
            yield prefix + name, plain


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.moe.num_experts_per_tok", 64, "n_routed_experts=63"),
        ("model.moe.num_experts_per_tok", 0, "n_routed_experts=0"),
        ("model.moe.balance.expert.scope", "device", "global_batch"),
        ("model.moe.balance.expert.schedule", ((0.5, 1.0), (0.2, 0.0)), "growing shares"),
        ("model.moe.balance.expert.schedule", ((0.5, 1.0, 2.0),), "must be pairs"),
        ("model.moe.balance.expert.schedule", ((0.5, -1.0),), "multiple >= 0"),
        ("model.moe.balance.expert.schedule", ((1.5, 1.0),), "in 0..1"),
        ("model.moe.router.bias_update_schedule", ((0.5, 1.0),), "without a bias_update_speed"),
        ("model.moe.router.bias_update_schedule", ((0.5, 1.0), (0.2, 0.0)), "growing shares"),
        ("model.moe.router.bias_update_speed", math.inf, "must be finite"),
        ("model.moe.router.routed_scaling_factor", math.nan, "must be finite"),
        ("model.moe.balance.expert.factor", -0.1, ">= 0"),
        ("model.moe.drop.capacity_factor", 0.0, "> 0"),
        ("model.moe.drop.protected_share", 1.5, "at most 1"),
        ("model.moe.router.jitter", 1.0, "below 1"),
        ("model.moe.moe_intermediate_size", 0, "> 0"),
        ("model.moe.n_shared_experts", -1, ">= 0"),
        ("model.attention.num_key_value_heads", 3, "divide num_attention_heads=10"),
        ("model.attention.head_dim", 127, "even"),
        ("model.first_k_dense_replace", 9, "num_hidden_layers=9"),
        ("model.compute_dtype", "float16", "bfloat16"),
        ("data.tokenizer_vocab_size", 9000, "vocab_size=8192"),
        ("optimizer.decay_at", (0.9, 0.8), "increasing"),
        ("optimizer.b2", 1.0, "below 1"),
        ("optimizer.b2", 1 - 2**-26, "below 1 in float32"),
        ("train.accumulation_steps", 3, "divide global_batch_size=2048"),
        ("train.seed", -1, ">= 0"),
        ("train.seed", 2**32, "32 bits"),  # JAX would take it for seed 0
        ("train.seed", 2**64, "32 bits"),
        ("train.steps", 2**31, "below 2^31"),
        ("train.stages.share", (True,), "must be shares"),
        ("optimizer.peak_learning_rate", 1e9, "at most 10"),
        ("optimizer.weight_decay", 1e4, "times peak_learning_rate=0.00108 it must be below 1"),
        ("model.moe.drop.capacity_factor", 1e9, "at most n_routed_experts=63"),
        ("model.moe.evaluation_drop.capacity_factor", 64.0, "at most n_routed_experts=63"),
        ("model.moe.router.routed_scaling_factor", -1.0, ">= 0"),
    ],
)
def test_impossible_values_are_refused(key, value, says):
    with pytest.raises(ValueError) as error:
        replace(Config(), **{key: value})
    message = str(error.value)
    assert message.startswith(f"{key}={value!r}: ")
    assert says in message
    assert "\n" not in message


FLOATS = [key for key, hint in hints() if hint is float]
WHOLE = [key for key, hint in hints() if hint is int]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 1e-46, True, "1"])
def test_no_fraction_is_what_the_device_cannot_hold(value):
    """1e39 would be infinite in float32, 1e-46 would be 0."""
    assert len(FLOATS) > 15
    for key in FLOATS:
        with pytest.raises(ValueError, match=re.escape(key.rpartition(".")[2])) as error:
            replace(Config(), **{key: value})
        assert "\n" not in str(error.value)
    assert "optimizer.eps" in FLOATS


@pytest.mark.parametrize("pair", [(0.0, math.inf), (math.nan, 1.0), (0.5, math.nan)])
def test_a_schedule_is_of_finite_numbers(pair):
    with pytest.raises(ValueError, match=r"balance\.expert\.schedule=.*: must be finite"):
        replace(Config(), **{"model.moe.balance.expert.schedule": (pair,)})
    with pytest.raises(ValueError, match=r"balance\.expert\.schedule=.*: must be pairs"):
        MoEConfig(balance=FrozenDict(expert=BalanceTerm(0.01, schedule=(pair,))))


@pytest.mark.parametrize("value", [2**64, -(2**64), 1.0, math.nan, True])
def test_no_whole_number_is_what_the_device_cannot_hold(value):
    assert len(WHOLE) > 20
    for key in WHOLE:
        with pytest.raises(ValueError, match=re.escape(key.rpartition(".")[2])) as error:
            replace(Config(), **{key: value})
        assert "\n" not in str(error.value)


def test_the_largest_seed_is_itself():
    """No seed is cut: the largest is not that of another run, and all sections accept it."""
    largest = 2**32 - 1
    assert replace(Config(), **{"train.seed": largest}).train.seed == largest
    keys = [jax.random.key_data(jax.random.key(seed)) for seed in (largest, largest - 1, 0)]
    assert len({key.tobytes() for key in map(np.asarray, keys)}) == 3
    assert replace(Config(), **{"optimizer.weight_decay": -0.0}).optimizer.weight_decay == 0


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        ({"router.n_group": 4}, "router.n_group=4: must divide n_routed_experts=63"),
        ({"expert_groups": 4}, "expert_groups=4: must divide n_routed_experts=63"),
        (
            {"router.n_group": 21, "router.topk_group": 2},
            "router.topk_group=2: groups of 3 experts are 6 experts, fewer than"
            " num_experts_per_tok=7",
        ),
        (
            {
                "router.n_group": 63,
                "router.topk_group": 7,
                "router.group_score": "top2_sum",
            },
            "router.group_score='top2_sum': needs 2 experts a group, n_group=63 leaves 1",
        ),
    ],
)
def test_impossible_groups_are_refused_with_the_numbers(moe, says):
    with pytest.raises(ValueError) as error:
        replace(Config(), **{f"model.moe.{key}": value for key, value in moe.items()})
    assert str(error.value).startswith(f"model.moe.{says}")
    assert "\n" not in str(error.value)


def test_a_token_cannot_use_more_groups_than_there_are():
    with pytest.raises(ValueError, match=r"topk_group=8: cannot exceed n_group=7"):
        RouterConfig(n_group=7, topk_group=8)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.hiden_size", 4, "did you mean model.hidden_size?"),
        (
            "model.moe.xyz",
            4,
            "model.moe has balance, dispatch, drop, evaluation_drop, expert, expert_backend, ",
        ),
        ("modle.hidden_size", 4, "did you mean model.hidden_size?"),
        ("norm_topk_prob", True, "did you mean model.moe.router.norm_topk_prob?"),
        ("model.moe.capacity_factor", 1.0, "did you mean model.moe.drop.capacity_factor?"),
        ("model.moe.drop.polciy", "device", "did you mean model.moe.drop.policy?"),
        ("model.moe.drop.policy.x", 1, "model.moe.drop.policy is 'position', not a section"),
        ("zyx.zyx", 1, "there is no section 'zyx'"),
        ("model.hidden_size", 4.0, "a whole number (int)"),
        ("model.hidden_size", True, "a whole number (int)"),
        ("model.hidden_size", None, "a whole number (int)"),
        ("model.moe.router.norm_topk_prob", 1, "True or False (bool)"),
        ("data.domains", "en", "must be a tuple"),
        ("model.moe", 3, "must be a section"),
    ],
)
def test_wrong_keys_and_types_are_refused(key, value, says):
    with pytest.raises(ValueError, match=key.rpartition(".")[2]) as error:
        replace(Config(), **{key: value})
    assert says in str(error.value)


def test_a_balance_term_needs_a_factor():
    with pytest.raises(ValueError, match=r"model\.moe\.balance\.device\.factor=None: missing"):
        replace(Config(), **{"model.moe.balance.device.scope": "sequence"})


def test_a_missing_key_is_refused():
    tree = to_config_dict(Config()).to_dict()
    del tree["train"]["seed"]
    with pytest.raises(ValueError, match=r"train\.seed"):
        from_config_dict(tree)


def test_round_trip_through_config_dict_and_json():
    config = replace(Config(), **{"data.domains": ("en_books",), "model.moe.n_shared_experts": 2})
    tree = to_config_dict(config)
    assert from_config_dict(tree) == config
    assert from_config_dict(json.loads(tree.to_json())) == config


def test_the_repr_of_a_config_is_python_for_the_same_config():
    """Sections by name too, which must stay such that the config has a hash."""
    shown = replace(
        Config(), **{"train.stages.share": (0.5, 0.5), "model.moe.drop.policy": "position"}
    )
    again = eval(repr(shown), vars(dsmoe_jax.config).copy())
    assert again == shown
    assert hash(again) == hash(shown)


def test_whole_numbers_are_accepted_for_fractions():
    tree = to_config_dict(Config()).to_dict()
    tree["optimizer"]["clip_norm"] = 2
    value = from_config_dict(tree).optimizer.clip_norm
    assert isinstance(value, float)
    assert value == 2.0


def test_differences_name_the_changed_keys():
    assert differences(Config(), replace(Config(), **{"train.seed": 3})) == {"train.seed": (0, 3)}


def test_a_layer_without_any_expert_is_refused():
    with pytest.raises(ValueError, match="needs an expert"):
        MoEConfig(n_routed_experts=0, n_shared_experts=0, num_experts_per_tok=0)


def test_none_takes_a_section_out_and_a_key_in_it_brings_it_back():
    dropless = Config()
    assert dropless.model.moe.drop is None
    drops = replace(dropless, **{"model.moe.drop.policy": "probability"})
    assert drops.model.moe.drop == DropConfig(policy="probability")
    assert replace(drops, **{"model.moe.drop": None}) == dropless


def test_balance_terms_are_set_by_name():
    config = replace(
        Config(),
        **{
            "model.moe.balance.expert": None,
            "model.moe.balance.device.factor": 0.05,
            "model.moe.balance.device.schedule": ((0, 0), (0.5, 1)),
        },
    )
    schedule = ((0.0, 0.0), (0.5, 1.0))
    assert config.model.moe.balance == {"device": BalanceTerm(0.05, schedule=schedule)}
    assert from_config_dict(to_config_dict(config)) == config
    with pytest.raises(TypeError, match="cannot change"):
        config.model.moe.balance["expert"] = BalanceTerm(0.1)


def test_a_config_can_be_hashed():
    """JAX keeps one program for each config that a module holds."""
    config = replace(Config(), **{"train.stages.share": (0.5, 0.5)})
    assert hash(config) == hash(replace(config, **{"train.seed": 0}))


def test_a_config_of_the_old_form_is_refused_in_one_line():
    tree = to_config_dict(Config()).to_dict()
    tree["model"]["moe"] = {"router": "topk_softmax", "expert_balance_factor": 0.01}
    with pytest.raises(ValueError, match=r"router='topk_softmax': a config of an older form"):
        from_config_dict(tree)
