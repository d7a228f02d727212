"""Every knob of a run, as frozen dataclasses that refuse to be built wrong.

A config file (`configs/*.py`) is a small program that returns a `Config` as an
`ml_collections.ConfigDict`, so that the command line can override any key
(`--config.model.num_hidden_layers=4`).  `from_config_dict` turns the result back into the
dataclasses below; an unknown key, a wrong type or an impossible size is a `ValueError` that names
the key, the value and what would be right.

Field names follow the released Hugging Face configs of DeepSeekMoE / V2 / V3.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import ml_collections

from dsmoe_jax.config import trees
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.data import DataConfig
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.config.model import ModelConfig
from dsmoe_jax.config.train import OptimizerConfig, StagesConfig, TrainConfig


class Stage(NamedTuple):
    """A part of a run.

    Attributes:
      first, end: updates made before it and after it.
      sequences: of the stages before it.
      config: in force; without stages of its own.
    """

    first: int
    end: int
    sequences: int
    config: Config


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

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
        self._check_routing()
        self.stages()  # refuses those that cannot be

    def _check_routing(self) -> None:
        train, router = self.train, self.model.moe.router
        replays, key = router in ("replay", "replay_ids"), "train.replay_routing"
        want = "needs the WORKDIR/routing of a run" if replays else "replays nothing"
        want = f"model.moe.router={router!r} {want}"
        require(replays == bool(train.replay_routing), key, train.replay_routing, want)
        if train.record_routing or replays:
            key = "train.record_routing" if train.record_routing else key
            value = train.record_routing or train.replay_routing
            require(self.model.moe.n_routed_experts > 0, key, value, "there are no routed experts")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step (of a run without stages)."""
        return self.train.global_batch_size * self.data.sequence_length

    def tokens_after(self, step: int) -> int:
        """Tokens of the first `step` updates."""
        *_, stage = (s for s in self.stages() if s.first < max(step, 1))
        batch_size = stage.config.train.global_batch_size
        return (stage.sequences + (step - stage.first) * batch_size) * self.data.sequence_length

    def stage_of(self, step: int) -> Stage:
        """The stage that update number `step` (1 is the first) belongs to."""
        return next(s for s in self.stages() if step <= s.end)

    def stages(self) -> tuple[Stage, ...]:
        """What is in force when; one stage if the run has none.

        Raises:
          ValueError: for a stage that cannot be.
        """
        columns, steps = dataclasses.asdict(self.train.stages), self.train.steps
        if not (share := columns.pop("share")):
            return (Stage(0, steps, 0, self),)
        stages, first, sequences = [], 0, 0
        for i in range(len(share)):
            end = steps if i + 1 == len(share) else round(sum(share[: i + 1]) * steps)
            require(end > first, "train.stages.share", share, f"leaves stage {i} without a step")
            try:
                config = _stage_config(self, {k: v[i] for k, v in columns.items() if v})
            except ValueError as error:
                raise ValueError(f"train.stages: stage {i}: {error}") from None
            stages.append(Stage(first, end, sequences, config))
            sequences += (end - first) * config.train.global_batch_size
            first = end
        return tuple(stages)


def _stage_config(config: Config, values: dict[str, Any]) -> Config:
    """The config with the values of one stage, each in the section that has its key."""
    tree = dataclasses.asdict(config)
    tree["train"]["stages"] = dataclasses.asdict(StagesConfig())
    for section in (tree["train"], tree["optimizer"], tree["model"]["moe"]):
        section |= {key: value for key, value in values.items() if key in section}
    return from_config_dict(tree)


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The config as a locked `ConfigDict`: unknown keys on the command line are refused."""
    return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def from_config_dict(tree: Any) -> Config:
    """Builds the validated dataclasses from a `ConfigDict` or from (JSON) dictionaries.

    Raises:
      ValueError: naming the key for an unknown or missing key, a wrong type or an impossible value.
    """
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    return trees.build(Config, tree)


def replace(config: Config, **overrides: Any) -> Config:
    """A copy with dotted keys changed: `replace(c, **{"model.moe.n_shared_experts": 2})`."""
    tree = dataclasses.asdict(config)
    for key, value in overrides.items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            require(part in node, key, value, f"there is no section {part!r}")
            node = node[part]
        node[leaf] = value  # an unknown leaf is refused by from_config_dict, with a suggestion
    return from_config_dict(tree)


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ: `{key: (value in a, value in b)}`."""
    flat_a, flat_b = (dict(trees.flatten(dataclasses.asdict(c))) for c in (a, b))
    return {k: (flat_a[k], flat_b[k]) for k in flat_a if flat_a[k] != flat_b[k]}
