"""The numbers that papers print about their models, in one table by the name of the config file.

Config files take their sizes and training settings from here; `count` and the tests compare our
figures with the printed ones, experiments compare losses.

V1  DeepSeekMoE, arXiv 2401.06066
V2  DeepSeek-V2, arXiv 2405.04434; V2-Lite is its appendix B
V3  DeepSeek-V3, arXiv 2412.19437
Other open mixtures: their model cards.

Figures keep their printed digits ("16.4B"), because these show the precision of a figure.
dsmoe_jax/model/size.py defines what each of them includes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from dsmoe_jax.config.frozen import FrozenDict

# Figure -> distance that ours may have from the interval of the printed digits, relative to them.
TOLERANCE = {
    "total": 0.01,
    "activated": 0.01,
    "activated_without_embedding": 0.01,
    "expert_total": 0.01,
    "expert_activated": 0.01,
    "flops_per_sequence": 0.003,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the Transformer and training settings that the models of a comparison share.

    Attributes:
      num_key_value_heads: None is as many as there are query heads.
      tokenizer_vocab_size: rows of the embedding that the tokenizer fills; None is all.
      sequence_length: tokens.
      global_batch_size: sequences of an optimizer step.
      decay_at: shares of the steps at which the learning rate drops to 0.316 of itself.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    sequence_length: int
    global_batch_size: int
    steps: int
    peak_learning_rate: float
    warmup_steps: int
    decay_at: tuple[float, ...] = (0.8, 0.9)
    initializer_range: float = 0.006
    num_key_value_heads: int | None = None
    tokenizer_vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """Numbers that a paper prints about one model; None where it prints none.

    Attributes:
      source: tables, figures and sections of the paper.
      settings: of its training run.
      loss: on held-out text at the end of training, nats per token.
      total, activated, activated_without_embedding, expert_total, expert_activated: numbers of
        parameters.
      flops_per_sequence: training FLOPs of one sequence.
      flops_percent: its FLOPs in per cent of those of other models.
      irreproducible: figures that do not follow from the paper's own sizes, with the reason.
    """

    source: str
    settings: Settings
    loss: float | None = None
    total: str | None = None
    activated: str | None = None
    activated_without_embedding: str | None = None
    expert_total: str | None = None
    expert_activated: str | None = None
    flops_per_sequence: str | None = None
    flops_percent: Mapping[str, float] = FrozenDict()
    irreproducible: Mapping[str, str] = FrozenDict()

    @property
    def figures(self) -> dict[str, str]:
        """The printed digits by name of the figure."""
        printed = {name: getattr(self, name) for name in TOLERANCE}
        return {name: digits for name, digits in printed.items() if digits is not None}


# V1 sections 4.1, 5.1 and 7.1, and table 7.
V1_2B = Settings(
    hidden_size=1280, num_hidden_layers=9, num_attention_heads=10, head_dim=128, vocab_size=8192,
    sequence_length=2048, global_batch_size=2048, steps=25_000, peak_learning_rate=1.08e-3,
    warmup_steps=2000,
)  # fmt: skip
V1_16B = Settings(
    hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, head_dim=128,
    vocab_size=102_400, tokenizer_vocab_size=100_000, sequence_length=4096,
    global_batch_size=4608, steps=106_449, peak_learning_rate=4.2e-4, warmup_steps=2000,
)  # fmt: skip
V1_145B = dataclasses.replace(
    V1_16B, hidden_size=4096, num_hidden_layers=62, num_attention_heads=32, steps=13_000,
    peak_learning_rate=3.0e-4, decay_at=(),
)  # fmt: skip
# Dense models to compare with.  V1 prints none of their training settings: those of the 16B (7B)
# and of the 145B (67B, which V1 trained on the same 245B tokens) are used here.
V1_DENSE_7B = dataclasses.replace(
    V1_16B, hidden_size=4096, num_hidden_layers=30, num_attention_heads=32
)
V1_LLAMA2_7B = dataclasses.replace(
    V1_DENSE_7B, num_hidden_layers=32, vocab_size=32_000, tokenizer_vocab_size=32_000
)
V1_DENSE_67B = dataclasses.replace(
    V1_145B, hidden_size=8192, num_hidden_layers=95, num_attention_heads=64, num_key_value_heads=8
)

V1: dict[str, Model] = {
    "dense_2b": Model(
        "table 1", V1_2B, loss=2.060,
        total="0.2B", activated="0.2B", flops_per_sequence="2.9T",
    ),
    "hash_2b": Model(
        "table 1", V1_2B, loss=1.932,
        total="2.0B", activated="0.2B", flops_per_sequence="2.9T",
    ),
    "switch_2b": Model(
        "table 1", V1_2B, loss=1.881,
        total="2.0B", activated="0.2B", flops_per_sequence="2.9T",
    ),
    "gshard_2b": Model(
        "table 1", V1_2B, loss=1.867,
        total="2.0B", activated="0.3B", flops_per_sequence="4.3T",
    ),
    "dsmoe_2b": Model(
        "tables 1 and 2", V1_2B, loss=1.808,
        total="2.0B", activated="0.3B", expert_total="1.89B", expert_activated="0.24B",
        flops_per_sequence="4.3T",
    ),
    "dsmoe_2b_shared2": Model("section 4.4", V1_2B, loss=1.806),
    "dsmoe_2b_shared4": Model("section 4.4", V1_2B, loss=1.811),
    "gshard_2b_x1_2": Model(
        "table 8", V1_2B, loss=1.824,
        expert_total="2.3B", expert_activated="0.28B",
    ),
    "gshard_2b_x1_5": Model(
        "table 2", V1_2B, loss=1.808,
        expert_total="2.83B", expert_activated="0.35B", flops_per_sequence="5.8T",
    ),
    "dense_2b_x4": Model(
        "table 9", V1_2B, loss=1.908,
        expert_total="0.47B", expert_activated="0.47B",
    ),
    "dense_2b_x16": Model(
        "table 2", V1_2B, loss=1.806,
        expert_total="1.89B", expert_activated="1.89B", flops_per_sequence="24.6T",
    ),
    "dsmoe_16b": Model(
        "tables 3 and 4", V1_16B,
        total="16.4B", activated="2.8B", flops_per_sequence="74.4T",
        flops_percent=FrozenDict(deepseek_7b=40.5, llama2_7b=39.6),
    ),
    "deepseek_7b": Model(
        "table 3", V1_DENSE_7B,
        total="6.9B", activated="6.9B", flops_per_sequence="183.5T",
    ),
    "llama2_7b": Model(
        "table 4", V1_LLAMA2_7B,
        total="6.7B", activated="6.7B", flops_per_sequence="187.9T",
    ),
    "deepseek_67b": Model(
        "table 6", V1_DENSE_67B, loss=1.905,
        total="67.4B", activated="67.4B", flops_per_sequence="2057.5T",
    ),
    "gshard_137b": Model(
        "table 6", V1_145B, loss=1.961,
        total="136.5B", activated="21.6B", flops_per_sequence="572.7T",
    ),
    "dsmoe_145b": Model(
        "table 6", V1_145B, loss=1.876,
        total="144.6B", activated="22.2B", flops_per_sequence="585.6T",
        flops_percent=FrozenDict(deepseek_67b=28.5),
    ),
    "dsmoe_142b_half": Model(
        "table 6", V1_145B, loss=1.888,
        total="142.3B", activated="12.2B", flops_per_sequence="374.6T",
        flops_percent=FrozenDict(deepseek_67b=18.2),
        irreproducible=FrozenDict(
            activated="The sizes (2 + 6 experts of 1408, a dense layer of 10944, attention,"
            " embedding and head) add up to 13.6B"
        ),
    ),
}  # fmt: skip


def _steps(tokens: float, sequences: int) -> int:
    """Optimizer steps of a number of tokens in sequences of 4096."""
    return round(tokens / (sequences * 4096))


# V2 section 3.1.2 and appendix B.  The batch of V2 grows from 2304 to 9216 sequences in the first
# 225B tokens; here it is 9216 throughout.
V2_LITE = dataclasses.replace(V1_16B, num_hidden_layers=27, steps=_steps(5.7e12, 4608))
V2_236B = dataclasses.replace(
    V1_16B, hidden_size=5120, num_hidden_layers=60, num_attention_heads=128,
    global_batch_size=9216, steps=_steps(8.1e12, 9216), peak_learning_rate=2.4e-4,
    decay_at=(0.6, 0.9),
)  # fmt: skip
# V3 section 4.2.  The batch grows from 3072 to 15360 sequences in the first 469B tokens; here it is
# 15360 throughout.  The rate is constant up to 10 of 14.8T tokens, then a cosine up to 14.3T.
V3_671B = dataclasses.replace(
    V1_16B, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, vocab_size=129_280,
    tokenizer_vocab_size=None, global_batch_size=15_360, steps=_steps(14.8e12, 15_360),
    peak_learning_rate=2.2e-4, decay_at=(10 / 14.8, 14.3 / 14.8),
)  # fmt: skip
# Sizes from the released configs.  Not all of their training settings are published: those of V1's
# 16B stand for them.
MIXTRAL = dataclasses.replace(
    V1_16B, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=32_000, tokenizer_vocab_size=None,
)  # fmt: skip
QWEN1_5 = dataclasses.replace(
    V1_16B, num_hidden_layers=24, vocab_size=151_936, tokenizer_vocab_size=None
)
QWEN3 = dataclasses.replace(
    QWEN1_5, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4
)
OLMOE = dataclasses.replace(
    V1_16B, num_hidden_layers=16, vocab_size=50_304, tokenizer_vocab_size=None
)

# Activated parameters are with embedding and head but for V2-Lite, whose 2.4B are without the
# embedding.
V2: dict[str, Model] = {
    "deepseek_v2_lite": Model(
        "V2 appendix B", V2_LITE, total="15.7B", activated_without_embedding="2.4B"
    ),
    "deepseek_v2": Model("V2 abstract", V2_236B, total="236B", activated="21B"),
}
V3: dict[str, Model] = {
    "deepseek_v3": Model("V3 abstract", V3_671B, total="671B", activated="37B"),
}
RELEASED: dict[str, Model] = {
    "mixtral_8x7b": Model("2401.04088", MIXTRAL, total="46.7B", activated="12.9B"),
    "qwen1_5_moe_a2_7b": Model("model card", QWEN1_5, total="14.3B", activated="2.7B"),
    "qwen3_30b_a3b": Model("model card", QWEN3, total="30.5B", activated="3.3B"),
    "olmoe_1b_7b": Model("2409.02060", OLMOE, total="6.9B", activated="1.3B"),
}

MODELS: dict[str, Model] = {**V1, **V2, **V3, **RELEASED}  # the models of all papers


def value(digits: str) -> float:
    """The number that a figure such as "16.4B", "74.4T" or "39.6%" stands for; per cent stay so."""
    return float(digits[:-1]) * {"M": 1e6, "B": 1e9, "T": 1e12, "%": 1.0}[digits[-1]]


def deviation(ours: float, digits: str) -> float:
    """Signed distance of `ours` from the interval that prints as `digits`, relative to the figure.

    0 inside the interval: "2.0B" stands for everything from 1.95B to 2.05B.
    """
    printed = value(digits)
    excess = max(abs(ours - printed) - _last_digit(digits) / 2, 0.0)
    return math.copysign(excess / printed, ours - printed)


def accepted(digits: str, tolerance: float = 0.0) -> tuple[float, float]:
    """Lowest and highest number whose `deviation` from the printed digits is in the tolerance."""
    printed = value(digits)
    distance = _last_digit(digits) / 2 + tolerance * printed
    return printed - distance, printed + distance


def _last_digit(digits: str) -> float:
    """Size of one in the last printed digit: 0.1e9 of "16.4B"."""
    decimals = len(digits[:-1].partition(".")[2])
    return value(f"1{digits[-1]}") * 10.0**-decimals
