"""Parts of a config.json that say otherwise than by a key what one of ours says.

A `Special` reads some keys of theirs into some of ours (below `model`, by dotted name), and writes
them back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dsmoe_jax.config.checks import require
from dsmoe_jax.nn.attention.rope import ROPE_TYPES

Tree = dict[str, Any]


class Special(NamedTuple):
    """A part of a config.

    Attributes:
      read: `(their tree) -> our values by key`; raises a ValueError that names a key of theirs.
      write: `(our values by key) -> their values by key`.
    """

    read: Callable[[Tree], Tree]
    write: Callable[[Tree], Tree]


_SCALING = "attention.rope_scaling."
_NO_SCALING = "default"
# Beside the settings that a rope type has.
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _rope(default_theta: float) -> Special:
    def read(tree: Tree) -> Tree:
        found = _parameters(tree)
        theta = found.get("rope_theta") or tree.get("rope_theta") or default_theta
        kind = found.get("rope_type") or found.get("type") or _NO_SCALING
        part = found.get("partial_rotary_factor") or tree.get("partial_rotary_factor") or 1.0
        require(part == 1, "partial_rotary_factor", part, "we rotate whole heads; must be 1")
        values: Tree = {"attention.rope_theta": float(theta)}
        if kind == _NO_SCALING:
            return values
        known = sorted(ROPE_TYPES)
        require(kind in ROPE_TYPES, "rope_scaling.rope_type", kind, f"must be one of {known}")
        settings = _settings(kind)
        # The length is that of the file, where the section does not say it.
        found.setdefault(_LENGTH, tree.get("max_position_embeddings"))
        values[f"{_SCALING}rope_type"] = kind
        for name in settings:
            if found.get(name):  # 0 is none in the released code
                values[_SCALING + name] = found[name]
        return values

    def write(ours: Tree) -> Tree:
        theta = ours["attention.rope_theta"]
        kind = ours.get(f"{_SCALING}rope_type")
        section = {"rope_type": kind or _NO_SCALING, "rope_theta": theta}
        # The first for transformers 5, the others for the versions before it.
        tree: Tree = {"rope_parameters": section, "rope_theta": theta}
        if kind is not None:
            numbers = {name: ours.get(_SCALING + name) for name in _settings(kind)}
            section |= {name: number for name, number in numbers.items() if number is not None}
            tree["rope_scaling"] = {"type": kind, **section}
        return tree

    return Special(read, write)


_LENGTH = "original_max_position_embeddings"


def _settings(kind: str) -> tuple[str, ...]:
    """The settings of a rope type, named alike there and here."""
    rope = ROPE_TYPES[kind]
    return ("factor", *rope.needs, *rope.reads)


def _parameters(tree: Tree) -> Tree:
    """The settings of the rotation, without those that are null."""
    found = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    require(isinstance(found, dict), "rope_scaling", found, "must be a section")
    return {key: value for key, value in found.items() if value is not None}


ROPE = _rope(10_000.0)
ROPE_OF_MIXTRAL = _rope(1e6)


def _read_head_dim(tree: Tree) -> Tree:
    if tree.get("head_dim") is not None:
        return {"attention.head_dim": tree["head_dim"]}
    return _read_even_heads(tree)


def _read_even_heads(tree: Tree) -> Tree:
    """The heads are as wide as the model together, whatever the file says."""
    size, heads = (_whole(tree, key) for key in ("hidden_size", "num_attention_heads"))
    require(size % heads == 0, "num_attention_heads", heads, f"must divide hidden_size={size}")
    return {"attention.head_dim": size // heads}


def _whole(tree: Tree, key: str) -> int:
    value = tree.get(key)
    require(type(value) is int and value > 0, key, value, "must be a whole number > 0")
    assert isinstance(value, int)
    return value


HEAD_DIM = Special(_read_head_dim, lambda ours: {"head_dim": ours["attention.head_dim"]})
EVEN_HEADS = Special(_read_even_heads, lambda ours: {})


def _read_key_value_heads(tree: Tree) -> Tree:
    """Latent attention has a key for each head: the key says nothing else."""
    heads = tree.get("num_attention_heads")
    same = tree.get("num_key_value_heads", heads)
    require(same in (heads, None), "num_key_value_heads", same, f"must be the {heads} heads")
    return {}


KEY_VALUE_HEADS = Special(
    _read_key_value_heads,
    lambda ours: {"num_key_value_heads": ours["attention.num_attention_heads"]},
)

_GROUPS = "moe.router."


def _read_v2_groups(tree: Tree) -> Tree:
    method = tree.get("topk_method", "greedy")
    known = ("greedy", "group_limited_greedy")
    require(method in known, "topk_method", method, f"must be one of {known}")
    if method == "greedy":
        return {}
    return {
        f"{_GROUPS}n_group": tree.get("n_group"),
        f"{_GROUPS}topk_group": tree.get("topk_group"),
        f"{_GROUPS}group_score": "max",
    }


def _write_v2_groups(ours: Tree) -> Tree:
    limited = ours[f"{_GROUPS}topk_group"] < ours[f"{_GROUPS}n_group"]
    return {
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "n_group": ours[f"{_GROUPS}n_group"],
        "topk_group": ours[f"{_GROUPS}topk_group"],
    }


V2_GROUPS = Special(_read_v2_groups, _write_v2_groups)


def _read_v3_groups(tree: Tree) -> Tree:
    groups = tree.get("n_group") or 1
    kept = tree.get("topk_group") or groups
    # All groups, or one, is no limit; then there need not be two experts in each.
    if kept == groups:
        return {}
    return {
        f"{_GROUPS}n_group": groups,
        f"{_GROUPS}topk_group": kept,
        f"{_GROUPS}group_score": "top2_sum",
    }


def _write_v3_groups(ours: Tree) -> Tree:
    return {"n_group": ours[f"{_GROUPS}n_group"], "topk_group": ours[f"{_GROUPS}topk_group"]}


V3_GROUPS = Special(_read_v3_groups, _write_v3_groups)


def _read_sparse_step(tree: Tree) -> Tree:
    step = tree.get("decoder_sparse_step", 1)
    require(type(step) is int and step > 0, "decoder_sparse_step", step, "must be at least 1")
    return {"moe_layer_freq": step, "moe_layer_offset": step - 1}


SPARSE_STEP = Special(
    _read_sparse_step, lambda ours: {"decoder_sparse_step": ours["moe_layer_freq"]}
)


def _read_ahead(tree: Tree) -> Tree:
    depth = tree.get("num_nextn_predict_layers") or 0
    return {"mtp.num_nextn_predict_layers": depth} if depth else {}


AHEAD = Special(
    _read_ahead,
    lambda ours: {"num_nextn_predict_layers": ours.get("mtp.num_nextn_predict_layers", 0)},
)


def _shared_width(ours: Tree) -> int:
    """Width of all shared experts together, as theirs has them."""
    one = ours["moe.shared_expert_intermediate_size"] or ours["moe.moe_intermediate_size"]
    return ours["moe.n_shared_experts"] * one


def _read_shared(tree: Tree) -> Tree:
    width = _whole(tree, "shared_expert_intermediate_size")
    return {"moe.n_shared_experts": 1, "moe.shared_expert_intermediate_size": width}


SHARED_EXPERT = Special(
    _read_shared, lambda ours: {"shared_expert_intermediate_size": _shared_width(ours)}
)

# A dense model of ours is one of shared experts alone.
DENSE = Special(
    lambda tree: {
        "moe.n_shared_experts": 1,
        "moe.moe_intermediate_size": _whole(tree, "intermediate_size"),
    },
    lambda ours: {"intermediate_size": _shared_width(ours)},
)
