"""The dataclasses refuse what cannot be, in one line that names the key and the value."""

import json

import pytest

from dsmoe_jax.config import (
    Config,
    MoEConfig,
    differences,
    from_config_dict,
    replace,
    to_config_dict,
)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.moe.num_experts_per_tok", 64, "n_routed_experts=63"),
        ("model.moe.num_experts_per_tok", 0, "n_routed_experts=0"),
        ("model.moe.balance.device.scope", "device", "global_batch"),
        ("model.moe.balance.expert.schedule", ((0.5, 1.0), (0.2, 0.0)), "growing shares"),
        ("model.moe.balance.expert.schedule", ((0.5, 1.0, 2.0),), "must be pairs"),
        ("model.moe.balance.expert.schedule", ((0.5, -1.0),), "multiple >= 0"),
        ("model.moe.balance.router_z.schedule", ((1.5, 1.0),), "in 0..1"),
        ("model.moe.moe_intermediate_size", 0, "> 0"),
        ("model.moe.n_shared_experts", -1, ">= 0"),
        ("model.attention.num_key_value_heads", 3, "divide num_attention_heads=10"),
        ("model.attention.head_dim", 127, "even"),
        ("model.first_k_dense_replace", 9, "num_hidden_layers=9"),
        ("model.compute_dtype", "float16", "bfloat16"),
        ("data.tokenizer_vocab_size", 9000, "vocab_size=8192"),
        ("optimizer.decay_at", (0.9, 0.8), "increasing"),
        ("optimizer.b2", 1.0, "below 1"),
        ("train.accumulation_steps", 3, "divide global_batch_size=2048"),
        ("train.seed", -1, ">= 0"),
    ],
)
def test_impossible_values_are_refused(key, value, says):
    with pytest.raises(ValueError) as error:
        replace(Config(), **{key: value})
    message = str(error.value)
    assert message.startswith(f"{key}={value!r}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        ({"n_group": 4}, "n_group=4: must divide n_routed_experts=63"),
        ({"expert_groups": 4}, "expert_groups=4: must divide n_routed_experts=63"),
        ({"n_group": 7, "topk_group": 8}, "topk_group=8: cannot exceed n_group=7"),
        (
            {"n_group": 21, "topk_group": 2},
            "topk_group=2: groups of 3 experts are 6 experts, fewer than num_experts_per_tok=7",
        ),
        (
            {"n_group": 63, "topk_group": 7, "group_score": "top2_sum"},
            "group_score='top2_sum': needs 2 experts a group, n_group=63 leaves 1",
        ),
        ({"device_balance_factor": 0.1}, "device_balance_factor=0.1: there is nothing to balance"),
        (
            {
                "n_group": 7,
                "topk_group": 3,
                "expert_groups": 9,
                "communication_balance_factor": 0.1,
            },
            "communication_balance_factor=0.1: counts the devices",
        ),
    ],
)
def test_impossible_groups_are_refused_with_the_numbers(moe, says):
    with pytest.raises(ValueError) as error:
        replace(Config(), **{f"model.moe.{key}": value for key, value in moe.items()})
    assert str(error.value).startswith(f"model.moe.{says}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.hiden_size", 4, "did you mean model.hidden_size?"),
        ("model.moe.xyz", 4, "known: n_routed_experts"),
        ("modle.hidden_size", 4, "no section"),
        ("model.hidden_size", 4.0, "type int"),
        ("model.hidden_size", True, "type int"),
        ("model.moe.router.norm_topk_prob", 1, "type bool"),
        ("data.domains", "en", "must be a list"),
        ("model.moe", 3, "must be a section"),
    ],
)
def test_wrong_keys_and_types_are_refused(key, value, says):
    with pytest.raises(ValueError, match=key.rpartition(".")[2]) as error:
        replace(Config(), **{key: value})
    assert says in str(error.value)


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
