"""Configs of Hugging Face and ours, in both directions.

A config of ours belongs to a family if its config.json, read back, gives a model that computes the
same: so the keys that no family expresses are found, and named, without a list of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dsmoe_jax.config import ModelConfig, trees
from dsmoe_jax.config.checks import require
from dsmoe_jax.hf.families import FAMILIES, REQUIRED, Family, Key
from dsmoe_jax.nn import attention

Tree = dict[str, Any]

_TYPE = "model_type"  # the key of a config.json that names the family
# Keys below `model` that change how a model is trained or run, not what it computes.
_WITHOUT_EFFECT = (
    "initializer_range",
    "nominal_dense_width",
    "mup_base_width",
    "compute_dtype",
    "remat",
    "head_block_tokens",
    "attention.kernel",
    "moe.nominal_width",
    "moe.expert_groups",
    "moe.balance",
    "moe.drop",
    "moe.evaluation_drop",
    "moe.dispatch",
    "moe.expert_backend",
    "moe.row_kernels",
    "moe.router.bias_update_schedule",
    "moe.router.jitter",
)

_LAYERS = ["first_k_dense_replace", "moe_layer_freq", "moe_layer_offset", "mlp_only_layers"]
_BIAS = "moe.router.bias_update_speed"
_SHARED = ["moe.n_shared_experts", "moe.shared_expert_intermediate_size"]


class Described(NamedTuple):
    """A model in the terms of Hugging Face: the name of its family, and its config.json."""

    family: str
    tree: Tree


def read(tree: Tree) -> tuple[str, ModelConfig]:
    """The family and our config of a config.json.

    Balance terms and drops, which a released model has none of, are left out.

    Raises:
      ValueError: naming a key and a value that we do not have.
    """
    name = tree.get(_TYPE)
    require(
        isinstance(name, str) and name in FAMILIES,
        _TYPE,
        name,
        f"an architecture that we do not have; must be one of {sorted(FAMILIES)}",
    )
    assert isinstance(name, str)
    family = FAMILIES[name]
    for key, served in family.theirs.items():
        value = tree.get(key, served[0])
        require(value in served, key, value, f"we do not have that; must be {served[0]!r}")
    values = {key: _value(tree, theirs) for key, theirs in family.keys.items()}
    values |= family.ours
    for special in family.special:
        values |= special.read(tree)
    ours = trees.to_tree(ModelConfig())
    ours["moe"]["balance"] = {}
    for key, value in values.items():
        trees.put(ModelConfig, ours, key, value)
    return name, trees.build(ModelConfig, ours, "model.")


def _value(tree: Tree, key: Key) -> Any:
    """The value of a key of theirs, under any of its names."""
    found = next((name for name in key.names if name in tree), key.names[0])
    value = tree.get(found, key.default)
    require(value is not REQUIRED, found, None, "missing")
    return key.null if value is None else value


def write(model: ModelConfig, first: str | None = None) -> Described:
    """The config.json of the family that a model belongs to.

    Args:
      model: the config.
      first: the name of a family that is taken if it is one of several.

    Raises:
      ValueError: naming the keys that no family expresses.
    """
    flat = _flat(model)
    names = sorted(FAMILIES, key=lambda name: (name != first, _unlike(FAMILIES[name], flat)))
    for name in names:
        if _unlike(FAMILIES[name], flat) == 0:
            tree = _written(name, flat)
            if not _differences(name, model, tree):
                return Described(name, tree)
    nearest = min(names, key=lambda name: _unlike(FAMILIES[name], flat))
    differences = _differences(nearest, model, _written(nearest, flat))
    raise ValueError(
        f"no architecture of Hugging Face expresses this model; the nearest,"
        f" {FAMILIES[nearest].architecture}, does not have {differences}"
    )


def _unlike(family: Family, flat: Tree) -> int:
    """Number of keys that differ, among those that are alike in all models of a family."""
    there = {**flat, **family.ours}
    return sum(_seen(flat).get(key) != _seen(there)[key] for key in family.ours)


def _seen(flat: Tree) -> Tree:
    """The same keys; of the bias's speed only whether there is a bias at all."""
    return {**flat, _BIAS: flat.get(_BIAS) is not None}


def _written(name: str, flat: Tree) -> Tree:
    """The config.json of a model as one of a family, which may not express it."""
    family = FAMILIES[name]
    tree: Tree = {"architectures": [family.architecture], _TYPE: name}
    if family.auto_map:
        tree["auto_map"] = dict(family.auto_map)
    tree |= {key: served[0] for key, served in family.theirs.items()}
    for key, theirs in family.keys.items():
        value = flat.get(key)
        is_null = value == theirs.null != theirs.default
        tree[theirs.names[0]] = None if is_null else value
    for special in family.special:
        tree |= special.write(flat)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items()}


def _differences(name: str, model: ModelConfig, tree: Tree) -> str:
    """The keys in which a model, written as a config.json, would come back as another one."""
    try:
        _, back = read(tree)
    except ValueError as error:
        return str(error)
    here, there = (_meaning(config, FAMILIES[name]) for config in (model, back))
    keys = [*here, *(key for key in there if key not in here)]
    return "; ".join(
        f"model.{key}={here.get(key)!r} (but {there.get(key)!r})"
        for key in keys
        if here.get(key) != there.get(key)
    )


def _flat(model: ModelConfig) -> Tree:
    """All keys of a config, the options of its attention with their defaults too."""
    flat = dict(trees.flatten(trees.to_tree(model)))
    for name, default in attention.get(model.attention).options.items():
        flat.setdefault(f"attention.options.{name}", default)
    return flat


def _meaning(model: ModelConfig, family: Family) -> Tree:
    """The part of a config that changes the numbers its model computes."""
    moe = model.moe
    router = moe.router
    meaning = _flat(model)
    without = [*_WITHOUT_EFFECT, *family.unused]
    meaning["attention.num_key_value_heads"] = (
        model.attention.num_key_value_heads or model.attention.num_attention_heads
    )
    # Several keys say which layers are dense, and how wide the shared experts are together.
    meaning["moe_layers"] = model.moe_layers
    meaning["moe.shared_width"] = moe.shared_width
    meaning["mtp_depth"] = model.mtp_depth
    without += [*_LAYERS, *_SHARED, "mtp"]
    if not model.n_dense_layers:
        without.append("intermediate_size")
    meaning = _seen(meaning)
    if not moe.n_routed_experts:
        without += ["moe.router", "moe.moe_intermediate_size"]
    if router.topk_group == router.n_group:
        without += [f"moe.router.{key}" for key in ("n_group", "topk_group", "group_score")]
    return {
        key: value
        for key, value in meaning.items()
        if not any(key == name or key.startswith(f"{name}.") for name in without)
    }
