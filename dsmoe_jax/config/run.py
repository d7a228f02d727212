"""A whole run: its sections, and the trees that commands, files and JSON make it from.

A config file (`configs/*.py`) is a small program that returns a `Config` as an
`ml_collections.ConfigDict`; the command line changes any key in it
(`--config.model.num_hidden_layers=4`).  An unknown key, a wrong type or an impossible size is a
`ValueError` that names the key, the value and what would be right.

Field names follow the released Hugging Face configs of DeepSeekMoE / V2 / V3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from dsmoe_jax.config import trees
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.data import DataConfig
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.config.model import ModelConfig
from dsmoe_jax.config.optimizer import OptimizerConfig
from dsmoe_jax.config.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Config of one run."""

    name: str = "unnamed"
    scale: str = "paper"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        require(
            self.data.tokenizer_vocab_size <= self.model.vocab_size,
            "data.tokenizer_vocab_size",
            self.data.tokenizer_vocab_size,
            f"must not exceed model.vocab_size={self.model.vocab_size}",
        )
        last = max((step for step, _ in self.optimizer.rate_changes), default=0)
        require(
            last <= self.train.steps,
            "optimizer.rate_changes",
            self.optimizer.rate_changes,
            f"must be of steps up to train.steps={self.train.steps}",
        )
        from dsmoe_jax.config.stages import stages_of  # imports this module

        stages_of(self)  # refuses an impossible table of stages

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step (of a run without stages)."""
        return self.train.global_batch_size * self.data.sequence_length


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The config as a locked `ConfigDict`, which refuses unknown keys."""
    return ml_collections.ConfigDict(trees.to_tree(config)).lock()


def from_config_dict(tree: Any) -> Config:
    """Builds the validated dataclasses from a `ConfigDict` or from (JSON) dictionaries.

    Raises:
      ValueError: naming the key for an unknown or missing key, a wrong type or an impossible value.
    """
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    _refuse_old_form(tree)
    return trees.build(Config, tree)


# Keys of older runs that are no more; no number depended on them.
_WITHOUT_EFFECT = ("model.moe.dispatch.buffer_factor",)


def from_saved(tree: Any) -> tuple[Config, dict[str, Any]]:
    """The config of a run, which may have begun before some keys were added.

    Args:
      tree: nested dictionaries, from JSON.

    Returns:
      The config, and the defaults that it was given by dotted key (or section).

    Raises:
      ValueError: like `from_config_dict`; for a missing key that has no default, too.
    """
    _refuse_old_form(tree)
    for section in ("model", "data", "train"):  # every run has had them: it is something else
        require(section in tree, section, None, "missing")
    for key in _WITHOUT_EFFECT:
        tree = _without(tree, key)
    filled, added = trees.with_defaults(Config, tree)
    return from_config_dict(filled), added


def _without(tree: Any, key: str) -> Any:
    """A tree without a dotted key, if it has it."""
    first, _, rest = key.partition(".")
    if not isinstance(tree, dict) or first not in tree:
        return tree
    if rest:
        return {**tree, first: _without(tree[first], rest)}  # in the order that it has
    return {name: value for name, value in tree.items() if name != first}


def _refuse_old_form(tree: Any) -> None:
    """Refuses a config from before `model.moe` had sections."""
    # Otherwise the error would name only the first of many keys that have moved.
    model = tree.get("model") if isinstance(tree, dict) else None
    moe = model.get("moe") if isinstance(model, dict) else None
    if isinstance(moe, dict) and isinstance(moe.get("router"), str):
        raise ValueError(
            f"model.moe.router={moe['router']!r}: a config of an older form, in which it was a"
            " name; it must be a section (model.moe.router.name): write the config anew"
        )


def replace(config: Config, **overrides: Any) -> Config:
    """A copy with dotted keys changed: `replace(c, **{"model.moe.n_shared_experts": 2})`.

    A section that is None begins with its defaults when a key in it is set, and None takes a
    section or a balance term out:

        replace(c, **{"model.moe.drop.policy": "probability", "model.moe.balance.expert": None})

    Raises:
      ValueError: for an unknown key, saying which one was probably meant; for an impossible value.
    """
    tree = trees.to_tree(config)
    for key, value in overrides.items():
        trees.put(Config, tree, key, value)
    return from_config_dict(tree)


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ: `{key: (value in a, value in b)}`, None if missing."""
    flat_a, flat_b = (dict(trees.flatten(trees.to_tree(config))) for config in (a, b))
    keys = [*flat_a, *(key for key in flat_b if key not in flat_a)]
    pairs = {key: (flat_a.get(key), flat_b.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
