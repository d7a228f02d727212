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
import difflib
import types
import typing
from typing import Any

import ml_collections

from dsmoe_jax.checks import checker, not_negative, positive, require
from dsmoe_jax.moe.config import MoEConfig
from dsmoe_jax.parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, RoPE attention, SwiGLU, untied embeddings."""

    vocab_size: int = 8192
    hidden_size: int = 1280
    num_hidden_layers: int = 9
    num_attention_heads: int = 10
    num_key_value_heads: int = 10  # fewer than the heads is grouped-query attention
    head_dim: int = 128
    first_k_dense_replace: int = 0  # leading layers whose FFN is dense (16B, 145B: 1)
    intermediate_size: int = 3413  # width of those dense layers
    nominal_dense_width: float = 1.0  # the same relative to a standard FFN; accounting only
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006  # standard deviation of every matrix at the start
    compute_dtype: str = "auto"  # float32 on CPU, bfloat16 on accelerators
    remat: str = "none"  # a name in dsmoe_jax/nn/transformer.py: what the backward pass recomputes
    moe: MoEConfig = MoEConfig()

    def __post_init__(self) -> None:
        at, check = "model.", checker(self, "model.")
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        positive(
            self,
            at,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "nominal_dense_width",
            "rope_theta",
            "rms_norm_eps",
            "initializer_range",
        )
        check(
            "num_key_value_heads",
            heads % self.num_key_value_heads == 0,
            f"must divide num_attention_heads={heads}",
        )
        check("head_dim", self.head_dim % 2 == 0, "must be even for RoPE")
        check(
            "first_k_dense_replace",
            0 <= self.first_k_dense_replace < layers,
            f"must be below num_hidden_layers={layers}; a dense model has n_routed_experts=0",
        )
        dtypes = ("auto", "float32", "bfloat16")
        check("compute_dtype", self.compute_dtype in dtypes, f"must be one of {dtypes}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    corpus: str = "demo"  # "demo", "stdlib", a file or directory of text, or a prepared corpus
    sequence_length: int = 2048
    tokenizer_vocab_size: int = 8192  # of the byte-level BPE trained on the corpus
    domains: tuple[str, ...] = ()  # () is all of the corpus

    def __post_init__(self) -> None:
        positive(self, "data.", "sequence_length", "tokenizer_vocab_size")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule (V1 section 4.1.3)."""

    peak_learning_rate: float = 1.08e-3
    schedule: str = "multi_step"  # a name in dsmoe_jax/training/optimizer.py
    warmup_steps: int = 2000
    decay_factor: float = 0.316  # `multi_step`: applied at each of `decay_at`
    decay_at: tuple[float, ...] = (0.8, 0.9)  # shares of all steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        at, check = "optimizer.", checker(self, "optimizer.")
        positive(self, at, "peak_learning_rate", "decay_factor", "eps", "clip_norm")
        not_negative(self, at, "warmup_steps", "weight_decay", "b1", "b2")
        check("b1", self.b1 < 1, "must be below 1")
        check("b2", self.b2 < 1, "must be below 1")
        increasing = tuple(sorted(self.decay_at)) == self.decay_at
        check(
            "decay_at",
            increasing and all(0 < share < 1 for share in self.decay_at),
            "must be increasing shares between 0 and 1",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what is kept."""

    steps: int = 25_000
    global_batch_size: int = 2048  # sequences of one optimizer step
    accumulation_steps: int = 1  # the global batch is computed in this many micro-batches
    seed: int = 0  # every random choice derives from it
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    eval_every: int = 0  # 0: only after the last step
    eval_batches: int = 0  # 0: the whole validation split

    def __post_init__(self) -> None:
        at, check = "train.", checker(self, "train.")
        positive(
            self,
            at,
            "steps",
            "global_batch_size",
            "accumulation_steps",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        )
        not_negative(self, at, "eval_every", "eval_batches", "seed")
        check(
            "accumulation_steps",
            self.global_batch_size % self.accumulation_steps == 0,
            f"must divide global_batch_size={self.global_batch_size}",
        )


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

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.train.global_batch_size * self.data.sequence_length


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
    return _build(Config, tree, "")


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
    flat_a, flat_b = (dict(_flatten(dataclasses.asdict(c))) for c in (a, b))
    return {k: (flat_a[k], flat_b[k]) for k in flat_a if flat_a[k] != flat_b[k]}


def _flatten(tree: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _build(cls: type, tree: Any, prefix: str) -> Any:
    require(isinstance(tree, dict), prefix.rstrip(".") or "config", tree, "must be a section")
    hints = typing.get_type_hints(cls)
    for key in tree:
        close = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
        require(key in hints, prefix + key, tree[key], f"no such key; {hint}")
    for key in hints:
        require(key in tree, prefix + key, None, "missing")
    return cls(**{key: _convert(hints[key], tree[key], prefix + key) for key in hints})


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".")
    if isinstance(hint, types.GenericAlias):  # tuple[X, ...]
        require(isinstance(value, (list, tuple)), key, value, "must be a list")
        return tuple(_convert(typing.get_args(hint)[0], item, key) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is hint, key, value, f"must be of type {hint.__name__}")
    return value
